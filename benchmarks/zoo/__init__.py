"""Networks by suite."""

from zoo import adapters, images, language
from zoo.network import Network

NETWORKS: list[Network] = [*language.NETWORKS, *images.NETWORKS, *adapters.NETWORKS]
