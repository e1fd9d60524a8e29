"""What running models do, counted: collectors, and their figures in Prometheus' format."""

from sedac_hf.metrics.collector import SEDACMetricsCollector, TokenDecision
from sedac_hf.metrics.prometheus import MetricsServer, serve_metrics

__all__ = ["MetricsServer", "SEDACMetricsCollector", "TokenDecision", "serve_metrics"]
