"""LoRA: which modules are adapted, the layers on them, and adapters on disk in every format.

targets   the modules that LoRA can adapt, and their names in mlx-lm
attach    LoRA layers put on a model, taken off, and what they change, weight by weight
state     an adapter on disk in our layout, which is mlx-lm's
formats/  one file for each format: how it is recognised, read, written, and proved
"""
