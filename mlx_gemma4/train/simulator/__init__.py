"""What a step holds in memory, without taking it: its graph is traced, and MLX's evaluator simulated.

skeleton (a model without weights) -> tape (the graph; cuts makes custom gradients visible in it) ->
fusion (as mx.compile fuses) -> evaluator (order, buffers, run-ahead; layout and views know which
primitive takes which buffer).
"""
