"""Three checkpoints with soft exits, decided by hand, and what a collector says of them.

The cascade adds up confidence from checkpoint to checkpoint. A token that is sure runs the later
layers on the most important channels of their MLPs alone; the surer it is, the fewer:

>>> controller = make_controller()
>>> state = controller.start(2)
>>> risks = [(0.9, 0.1), (0.8, 0.1), (0.2, 0.1)]
>>> for k, row in enumerate(risks):
...     found = controller.step_risk(k, np.array(row, np.float32), state)
...     print(found.confidence.round(2), found.try_exit)
[0.1 0.9] [False  True]
[0.15 0.9 ] [False  True]
[0.39 0.9 ] [False  True]
>>> controller.strategy.skipped(np.array([0.5, 0.9])).round(3)
array([0.5  , 0.982])
>>> controller.strategy.kept(np.array([0.5, 0.9]), layer_idx=7, num_layers=10).tolist()
[[4, 1], [4, 1]]

A collector is told of each decision, from this loop or by a model that it is attached to:

>>> collector = SEDACMetricsCollector([7, 14, 21])
>>> report(controller, collector, [0.4, 0.8, 0.05])
>>> for layer, found in collector.get_layer_analysis().items():
...     ratio = round(found["mean_soft_exit_ratio"] or 0, 3)
...     print(layer, found["decisions"], found["exits"], ratio)
7 3 2 0.86
14 1 0 0
21 1 0 0
>>> "sedac_soft_exit_ratio" in collector.export_prometheus_metrics()
True
>>> collector.close()
"""

from __future__ import annotations

import numpy as np

from sedac_hf.core import CascadeConfig, CascadeController, LayerConfig
from sedac_hf.metrics import SEDACMetricsCollector


def make_controller() -> CascadeController:
    """Checkpoints after layers 7, 14 and 21 whose exits are soft."""
    layers = [LayerConfig(7), LayerConfig(14), LayerConfig(21)]
    return CascadeController(CascadeConfig(layers, strategy="soft"))


def report(
    controller: CascadeController, collector: SEDACMetricsCollector, risks: list[float]
) -> None:
    """Let tokens of these risks through the cascade, and tell the collector what was decided.

    Args:
        controller: The cascade.
        collector: Is told.
        risks: Risk of each token, the same at every checkpoint.
    """
    for token, risk in enumerate(risks):
        state = controller.start(1)
        for k, layer in enumerate(controller.config.layers):
            found = controller.step_risk(k, np.array([risk], np.float32), state)
            exits = bool(found.try_exit[0])
            skipped = controller.strategy.skipped(found.confidence.astype(np.float64))
            collector.record_token_decision(
                token_id=token,
                layer_idx=layer.layer_idx,
                risk_score=risk,
                threshold=layer.threshold,
                accumulated_confidence=float(found.confidence[0]),
                should_exit=exits,
                soft_exit_ratio=float(skipped[0]) if exits else 0.0,
                latency_ms=0.1,
            )
            if exits:
                break
    collector.flush()


if __name__ == "__main__":
    metrics = SEDACMetricsCollector([7, 14, 21])
    report(make_controller(), metrics, np.random.default_rng(0).uniform(0, 1, 200).tolist())
    print(metrics.export_prometheus_metrics())
    metrics.close()
