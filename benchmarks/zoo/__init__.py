"""Networks by suite."""

from zoo import language
from zoo.network import Network

NETWORKS: list[Network] = [*language.NETWORKS]
