"""What a step holds in memory, without taking it: a traced graph, and a simulated evaluator.

skeleton (a model without weights) -> tape (the graph; cuts makes custom gradients visible in it) ->
fusion (as mx.compile fuses) -> evaluator (order, buffers, run-ahead; layout and views know which
primitive takes which buffer).
"""
