"""Look at an installation and a cluster: what is here, what is wrong with it, what a model will need. For the CLI."""

from moecomm.diagnostics.facts import collect
from moecomm.diagnostics.forecast import Cluster, Forecast, forecast
from moecomm.diagnostics.probes import Finding, examine

__all__ = ["Cluster", "Finding", "Forecast", "collect", "examine", "forecast"]
