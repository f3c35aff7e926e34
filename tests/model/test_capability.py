"""The gate: native or legacy by structure alone, with a reason for every sign."""

from __future__ import annotations

import functools
import json
from unittest.mock import MagicMock, Mock

import mlx.nn as nn
import pytest
from helpers import SMALL_VISION, relative_gap, some_tokens

import mlx_gemma4 as g4
from mlx_gemma4.model.capability import Verdict, inspect_backbone
from mlx_gemma4.model.loader import build_backbone
from mlx_gemma4.model.names import text_model

NATIVE = (
    "previous_kvs names a source for every layer",
    "the layer takes shared_kv",
    "its attention takes shared_kv",
)


@pytest.fixture
def config(tiny) -> dict:
    return {**json.loads((tiny / "config.json").read_text()), "vision_config": SMALL_VISION}


class Attention:
    def __call__(self, x, mask=None, cache=None, shared_kv=None, offset=None):
        raise NotImplementedError


class LegacyAttention:
    def __call__(self, x, mask=None, cache=None):
        raise NotImplementedError


class Layer:
    def __init__(self, attention):
        self.self_attn = attention

    def __call__(self, x, mask=None, cache=None, shared_kv=None):
        raise NotImplementedError


class LegacyLayer(Layer):
    def __call__(self, x, mask=None, cache=None):
        raise NotImplementedError


class Holder:
    """Something with the attributes it is given."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def a_backbone(layer=Layer, attention=Attention, sources=(0, 1, 1), count=3, **rest) -> Holder:
    """A backbone of stand-ins; native unless something is changed."""
    layers = [layer(attention()) for _ in range(count)]
    text = Holder(layers=layers, **rest)
    if sources is not None:
        text.previous_kvs = list(sources) if isinstance(sources, tuple) else sources
    return Holder(model=text)


def verdict_of(backbone) -> tuple[bool, tuple[str, ...]]:
    verdict = inspect_backbone(backbone)
    return verdict.native, verdict.reasons


@pytest.mark.parametrize("shape", ["e2b", "e4b", "moe", "dense", "unified"])
def test_mlx_lm_is_native(checkpoints, shape):
    verdict = g4.load(checkpoints[shape]).loaded.verdict
    assert verdict == Verdict(True, NATIVE)
    assert str(verdict) == "native: " + "; ".join(NATIVE)


def test_mlx_vlm_is_what_its_structure_says(config):
    """Native from 0.5, legacy before; told by what the text model carries, not by a number."""
    backbone = build_backbone(g4.Plan.from_config(config), config)
    assert type(backbone).__module__.startswith("mlx_vlm")
    text = text_model(backbone)
    verdict = inspect_backbone(backbone)
    if hasattr(text, "layer_idx_to_cache_idx"):
        assert verdict == Verdict(
            False,
            (
                "the text model has no list previous_kvs",
                "the layer does not take shared_kv",
                "its attention does not take shared_kv",
            ),
        )
        assert str(verdict).startswith("legacy: the text model has no list previous_kvs; ")
    else:
        assert verdict == Verdict(True, NATIVE)
        assert len(text.previous_kvs) == 6


def test_a_stand_in_with_all_signs_is_native():
    assert verdict_of(a_backbone()) == (True, NATIVE)
    assert verdict_of(Holder(language_model=a_backbone())) == (True, NATIVE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": LegacyLayer}, "the layer does not take shared_kv"),
        ({"attention": LegacyAttention}, "its attention does not take shared_kv"),
        ({"sources": None}, "the text model has no list previous_kvs"),
        ({"sources": {0: 0, 1: 1, 2: 1}}, "the text model has no list previous_kvs"),
        ({"sources": "011"}, "the text model has no list previous_kvs"),
        ({"sources": 3}, "the text model has no list previous_kvs"),
        ({"sources": [0, None, 1]}, "the text model has no list previous_kvs"),
        ({"sources": [0, 1]}, "previous_kvs has 2 entries for 3 layers"),
        ({"sources": []}, "previous_kvs has 0 entries for 3 layers"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_one_absent_sign_makes_it_legacy(change, reason):
    native, reasons = verdict_of(a_backbone(**change))
    assert not native
    assert len(reasons) == 3 and reason in reasons
    assert len(set(reasons) & set(NATIVE)) == 2


@pytest.mark.parametrize(
    ("backbone", "seen"),
    [
        (Holder(), "'model'"),
        (Holder(model=Holder()), "'layers'"),
        (Holder(model=Holder(layers=[Holder()])), "'self_attn'"),
        (Holder(model=Holder(layers=[])), "out of range"),
        (Holder(model=Holder(layers=None)), "not iterable"),
        (None, "'model'"),
        (Holder(language_model=Holder()), "'model'"),
    ],
    ids=["no model", "no layers", "no attention", "empty", "None", "nothing", "no inner model"],
)
def test_a_backbone_that_cannot_be_walked_is_legacy(backbone, seen):
    native, (reason,) = verdict_of(backbone)
    assert not native
    assert reason.startswith("no text model with layers to look at") and seen in reason


class Forwards:
    """Wraps an object and forwards its attributes; calls take anything."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapper_around_the_backbone_or_text_model_is_seen_through(gemma):
    assert verdict_of(Forwards(gemma.backbone)) == (True, NATIVE)
    assert verdict_of(Holder(model=Forwards(text_model(gemma.backbone)))) == (True, NATIVE)
    legacy = a_backbone(LegacyLayer, LegacyAttention, sources=None)
    assert not verdict_of(Forwards(legacy))[0]


def test_a_wrapped_layer_whose_call_takes_anything_is_not_taken_on_trust():
    backbone = a_backbone()
    backbone.model.layers = [Forwards(layer) for layer in backbone.model.layers]
    assert verdict_of(backbone) == (
        False,
        (NATIVE[0], "the layer does not take shared_kv", NATIVE[2]),
    )


def test_an_attention_replaced_on_the_instance_is_looked_at(gemma):
    layer = text_model(gemma.backbone).layers[-1]
    layer.self_attn = Forwards(layer.self_attn)
    assert verdict_of(gemma.backbone) == (
        False,
        (*NATIVE[:2], "its attention does not take shared_kv"),
    )


def test_a_class_under_gradient_checkpointing_hides_its_sign(tiny, gemma, monkeypatch):
    """mlx-lm changes the class for the whole process; loading then says what to do."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    layers = text_model(gemma.backbone).layers
    kind = type(layers[0])
    monkeypatch.setattr(kind, "__call__", kind.__call__)
    grad_checkpoint(layers[0])
    assert verdict_of(gemma.backbone) == (
        False,
        (NATIVE[0], "the layer does not take shared_kv", NATIVE[2]),
    )
    with pytest.raises(g4.CapabilityError) as error:
        g4.load(tiny)
    assert "the layer does not take shared_kv" in error.value.found
    assert "start a new one" in error.value.do
    tokens = some_tokens(gemma.plan.vocab_size)
    assert relative_gap(gemma.logits(tokens), gemma.backbone(tokens)) < 1e-5


def test_a_wrapper_that_names_what_it_wraps_is_seen_through(monkeypatch):
    plain = Layer.__call__

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        return plain(*args, **kwargs)

    monkeypatch.setattr(Layer, "__call__", wrapped)
    assert verdict_of(a_backbone()) == (True, NATIVE)
    monkeypatch.setattr(Layer, "__call__", lambda *args, **kwargs: plain(*args, **kwargs))
    assert not verdict_of(a_backbone())[0]


def test_a_layer_behind_a_checkpointed_function_gets_a_verdict(gemma):
    """`nn.utils.checkpoint` makes functions of layers, which have no attention to look at."""
    text = text_model(gemma.backbone)
    text.layers = [nn.utils.checkpoint(layer) for layer in text.layers]
    native, (reason,) = verdict_of(gemma.backbone)
    assert not native
    assert reason.startswith("no text model with layers to look at") and "self_attn" in reason


@pytest.mark.parametrize("kind", [Mock, MagicMock])
def test_a_mock_is_legacy(kind):
    native, (reason,) = verdict_of(kind())
    assert not native and reason.startswith("no text model with layers to look at")


@pytest.mark.parametrize("names_sources", [False, True])
def test_a_mock_with_layers_is_legacy(names_sources):
    backbone = MagicMock()
    backbone.language_model.model.layers = [MagicMock(), MagicMock()]
    if names_sources:
        backbone.language_model.model.previous_kvs = [0, 0]
    assert verdict_of(backbone) == (
        False,
        (
            NATIVE[0] if names_sources else "the text model has no list previous_kvs",
            "the layer does not take shared_kv",
            "its attention does not take shared_kv",
        ),
    )


class _NoSignature:
    """A callable whose signature cannot be read."""

    def __init__(self, error):
        self.error = error

    @property
    def __signature__(self):
        raise self.error

    def __call__(self, *args, shared_kv=None):
        raise NotImplementedError


@pytest.mark.parametrize("error", [ValueError("none"), TypeError("none")], ids=["value", "type"])
def test_an_unreadable_signature_counts_as_absent(error):
    class UnreadableLayer(Layer):
        __call__ = _NoSignature(error)

    class UnreadableAttention:
        __call__ = _NoSignature(error)

    assert verdict_of(a_backbone(UnreadableLayer, UnreadableAttention)) == (
        False,
        (
            NATIVE[0],
            "the signature of the layer cannot be read",
            "the signature of its attention cannot be read",
        ),
    )


def test_a_builtin_call_and_no_call_count_as_absent():
    class Builtin(Layer):
        __call__ = dict.fromkeys

    class Uncallable:
        def __init__(self, attention):
            self.self_attn = attention

    for kind in (Builtin, Uncallable):
        native, reasons = verdict_of(a_backbone(kind))
        assert not native and reasons[1].endswith(("cannot be read", "does not take shared_kv"))


def test_the_gate_changes_nothing(gemma):
    before = {id(layer): dict(vars(layer)) for layer in text_model(gemma.backbone).layers}
    kind = type(text_model(gemma.backbone))
    inspect_backbone(gemma.backbone)
    after = {id(layer): dict(vars(layer)) for layer in text_model(gemma.backbone).layers}
    assert before == after and type(text_model(gemma.backbone)) is kind
