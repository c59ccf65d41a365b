"""Networks by suite."""

from zoo import adapters, graphs, images, language, vision
from zoo.network import Network

NETWORKS: list[Network] = [
    *language.NETWORKS,
    *images.NETWORKS,
    *adapters.NETWORKS,
    *vision.NETWORKS,
    *graphs.NETWORKS,
]
