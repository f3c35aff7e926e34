"""What an export that is not the trained model is told, and that nothing is kept of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from adapters import KINDS, assert_same, trainable, trained
from helpers import as_others_load_it

import mlx_gemma4 as g4
from mlx_gemma4 import export as room
from mlx_gemma4.export import FORMATS, export, verify
from mlx_gemma4.export.verify import Proof, check_adapter
from mlx_gemma4.lora.formats import ADAPTERS
from mlx_gemma4.lora.formats.mlx_lm import MlxLmLibrary
from mlx_gemma4.lora.formats.transformers import TransformersLibrary, architecture
from mlx_gemma4.model.plan import Plan, read_config

INNER = "layers.1.mlp.up_proj"
MLX = f"language_model.model.{INNER}"
PEFT = f"base_model.model.model.language_model.{INNER}"
NAMES = {
    "mlx-lm": (f"{MLX}.lora_a", f"{MLX}.lora_b", "adapters.safetensors"),
    "mlx-vlm-legacy": (f"{MLX}.A", f"{MLX}.B", "adapters.safetensors"),
    "peft": (f"{PEFT}.lora_A.weight", f"{PEFT}.lora_B.weight", "adapter_model.safetensors"),
}
DAMAGES = {
    "drop": lambda weights, a, b: weights.pop(a),
    "drop-pair": lambda weights, a, b: (weights.pop(a), weights.pop(b)),
    "rename": lambda weights, a, b: weights.update(
        {a.replace("mlp.up", "mlp.upper"): weights.pop(a)}
    ),
    "add": lambda weights, a, b: weights.update({a.replace("s.1.", "s.77."): weights[a]}),
    "transpose": lambda weights, a, b: weights.update({a: weights[a].T}),
}

TOLD = {**dict.fromkeys(DAMAGES, INNER), "add": "layers.77.mlp.up_proj", "rename": "mlp.upper_proj"}


@pytest.fixture
def gemma(tiny) -> g4.Gemma4:
    return trained(tiny, KINDS["lora"])


@pytest.fixture
def old(gemma, tmp_path) -> Path:
    """A folder with an earlier export, of other values."""
    export(gemma, tmp_path / "out", "mlx-lm", verify=False)
    name = f"{MLX}.lora_b"
    gemma.backbone.load_weights([(name, 3 * trainable(gemma)[name])], strict=False)
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(path: Path, change, *names: str) -> None:
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights, *names)
    mx.save_safetensors(str(path), weights)


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("format", NAMES)
def test_damage_is_named_by_load_and_by_verify(gemma, tiny, tmp_path, format, how):
    *names, file = NAMES[format]
    export(gemma, tmp_path / "out", format, verify=False)
    whole = dict(mx.load(str(tmp_path / "out" / file)))
    mx.eval(whole)
    damage(tmp_path / "out" / file, DAMAGES[how], *names)
    # The old mlx-vlm names no modules: what is wholly gone is known to verify alone.
    if (format, how) != ("mlx-vlm-legacy", "drop-pair"):
        with pytest.raises(g4.AdapterError) as error:
            g4.load(tiny, adapter=tmp_path / "out")
        assert TOLD[how] in error.value.found
    with pytest.raises(g4.ExportError) as error:
        check_adapter(gemma, tmp_path / "out", whole)
    assert TOLD[how] in error.value.found
    assert re.search("missing|unexpected|misshapen", error.value.found)


@pytest.mark.parametrize("format", NAMES)
def test_other_values_are_named_by_verify(gemma, tmp_path, format):
    *names, file = NAMES[format]
    export(gemma, tmp_path / "out", format, verify=False)
    whole = dict(mx.load(str(tmp_path / "out" / file)))
    mx.eval(whole)
    damage(tmp_path / "out" / file, lambda w, a, b: w.update({b: 1.001 * w[b]}), *names)
    with pytest.raises(g4.ExportError, match=rf"other values {re.escape(names[1])}"):
        check_adapter(gemma, tmp_path / "out", whole)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_short_is_refused(gemma, tmp_path, kept):
    export(gemma, tmp_path / "out", "peft", verify=False)
    path = tmp_path / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(g4.ExportError, match=r"adapter_model\.safetensors"):
        check_adapter(gemma, tmp_path / "out", {})


# ---------------------------------------------------------------- faults of ours


def faulty(monkeypatch, change) -> None:
    """Let the layout for mlx-lm make a mistake: `change` alters config and tensors in place."""
    write = ADAPTERS["mlx-lm"].write

    def wrong(adapter):
        config, weights = write(adapter)
        config, weights = json.loads(json.dumps(config)), dict(weights)
        change(config, weights)
        return config, weights

    monkeypatch.setattr(ADAPTERS["mlx-lm"], "write", wrong)


def refused(gemma, folder: Path) -> str:
    """The message of an export that must not be kept: the old folder is as it was."""
    before = contents(folder)
    with pytest.raises(g4.Gemma4Error) as error:
        export(gemma, folder)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return error.value.found


FAULTS = {
    "scale": lambda config, weights: config["lora_parameters"].update(scale=3.0),
    "key": lambda config, weights: config["lora_parameters"]["keys"].remove("mlp.up_proj"),
    "negated": lambda config, weights: weights.update({f"{MLX}.lora_b": -weights[f"{MLX}.lora_b"]}),
    "swapped": lambda config, weights: weights.update(
        {f"{MLX}.lora_a": weights[f"{MLX.replace('1', '2')}.lora_a"]}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rules_catch_a_wrong_layout(gemma, old, monkeypatch, fault):
    faulty(monkeypatch, FAULTS[fault])
    found = refused(gemma, old)
    assert fault == "scale" or "up_proj" in found


@pytest.mark.parametrize("fault", ["scale", "negated"])
def test_the_library_catches_it_too(gemma, old, monkeypatch, fault):
    if not (proof := export(gemma, old.with_name("probe"))[0]).by:
        pytest.skip(str(proof))
    shutil.rmtree(old.with_name("probe"))
    faulty(monkeypatch, FAULTS[fault])
    monkeypatch.setattr(room, "check_adapter", lambda *arguments: None)
    found = refused(gemma, old)
    assert re.search(r"in mlx-lm \S+ logits differ from the trained model's by \S+, and", found)


class Double(MlxLmLibrary):
    """A library made of ours, so that it can be made to fail in one way."""

    def __init__(self, gemma):
        self.gemma = gemma

    def load(self, base):
        return g4.load(base)

    def attach(self, model, adapter):
        return g4.load(self.gemma.name, adapter=adapter)

    def logits(self, model, tokens_T):
        return np.array(model.logits(mx.array([tokens_T]))[0])

    def holds(self, model):
        return trainable(model)


class Deaf(Double):
    """Loads an adapter and leaves out one tensor, as mlx-lm up to 0.31 would without a word."""

    def holds(self, model):
        return {**super().holds(model), f"{MLX}.lora_b": mx.zeros((4, 64))}


class Forgetful(Double):
    def attach(self, model, adapter):
        return model

    def holds(self, model):
        return super().holds(self.gemma)


class Elsewhere(Double):
    def logits(self, model, tokens_T):
        return super().logits(model, tokens_T) + 9 * np.arange(len(tokens_T))[:, None]


class Broken(Double):
    def attach(self, model, adapter):
        raise KeyError("lora_parameters")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Deaf, rf"other values {MLX}\.lora_b"),
        (Forgetful, "the export changes no logit"),
        (Elsewhere, r"by 4\.\d+e\+02, and the base's by 4"),
        (Broken, r"does not load .*: KeyError: 'lora_parameters'"),
    ],
)
def test_a_library_that_does_not_do_as_the_model_in_memory(gemma, old, monkeypatch, kind, told):
    monkeypatch.setattr(ADAPTERS["mlx-lm"], "library", Double(gemma))
    assert export(gemma, old)[0].difference == 0
    monkeypatch.setattr(ADAPTERS["mlx-lm"], "library", kind(gemma))
    assert re.search(told, refused(gemma, old))


# ---------------------------------------------------------------- nothing to export


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_that_changes_nothing_is_refused(tiny, tmp_path, format):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2, use_dora=format == "peft"))
    with pytest.raises(g4.AdapterError, match=r"zero|nothing"):
        export(gemma, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_dora_that_learned_lengths_alone_is_an_adapter(tiny, tmp_path):
    gemma = g4.load(tiny)
    gemma.add_lora(g4.LoraConfig(rank=2, use_dora=True))
    name = f"{MLX}.m"
    gemma.backbone.load_weights([(name, 2 * trainable(gemma)[name])], strict=False)
    export(gemma, tmp_path / "out", "peft")
    assert_same(trainable(g4.load(tiny, adapter=tmp_path / "out")), trainable(gemma))


def test_an_untrained_model_is_refused(tiny, tmp_path):
    with pytest.raises(g4.AdapterError, match="no trainable parameters"):
        export(g4.load(tiny), tmp_path / "out")


# ---------------------------------------------------------------- the proof


def test_a_library_that_is_not_installed(gemma, tmp_path, monkeypatch):
    absent = ("torch", "peft")
    monkeypatch.setattr(verify, "find_spec", lambda name: name not in absent)
    (proof,) = export(gemma, tmp_path / "out", "peft")
    assert str(proof) == (
        f"peft: {len(trainable(gemma))} tensors keep the format's rules; "
        "not run: torch and peft not installed"
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_line():
    told = str(Proof("peft", 72, "peft 0.21.2", 2.2e-5, 2.891))
    assert told == (
        "peft: 72 tensors, loaded by peft 0.21.2: logits within 2.2e-05 of the trained model's, "
        "up to 2.89 from the base's"
    )


# ---------------------------------------------------------------- the folder


def test_an_earlier_export_is_replaced(gemma, old):
    before = contents(old)
    export(gemma, old, "peft", verify=False)
    assert set(contents(old)) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    export(gemma, old, "mlx-lm", verify=False)
    assert set(contents(old)) == set(before) and contents(old) != before


@pytest.mark.parametrize("format", ["mlx-lm", "fused"])
def test_a_folder_with_other_files_is_kept(gemma, old, format):
    (old / "notes.txt").write_text("mine")
    before = contents(old)
    with pytest.raises(g4.ConfigError, match=r"(?s)holds other files:.*notes\.txt"):
        export(gemma, old, format)
    assert contents(old) == before


def test_an_unknown_format_and_options_for_another(gemma, tmp_path):
    with pytest.raises(g4.ConfigError, match="format is 'onnx'"):
        export(gemma, tmp_path / "out", "onnx")
    with pytest.raises(g4.ConfigError, match="quantize given for peft"):
        export(gemma, tmp_path / "out", "peft", quantize=4)


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import mlx_gemma4 as g4
from mlx_gemma4 import export as room

model, old, folder = map(Path, sys.argv[1:])
gemma = g4.load(model, adapter=old)
room.export(gemma, folder, "peft", verify=False)
new = {path.name: path.read_bytes() for path in folder.iterdir()}
before = {path.name: path.read_bytes() for path in old.iterdir()}

def write(path, tensors, metadata):  # in Python and in two parts, to be killed between them
    blob = new["adapter_model.safetensors"]
    with open(path, "wb") as file:
        file.write(blob[: len(blob) // 2])
        file.flush()
        sys.audit("half")
        file.write(blob[len(blob) // 2 :])

config, tensors = json.loads(new["adapter_config.json"]), {}
room.mx.save_safetensors = write
ours = room.adapter_of(gemma.backbone, gemma.lora, gemma.name)
# Nothing is computed after a fork: MLX's threads are not there.
room.adapter_of, room.require_effect = lambda *_: ours, lambda *_: None
room.ADAPTERS["peft"].write = lambda adapter: (config, tensors)
outcomes = []
for point in range(1, 400):
    for path in folder.parent.glob("*folder"):
        shutil.rmtree(path)
    shutil.copytree(old, folder)
    pid = os.fork()
    if not pid:
        left = point
        def count(event, arguments):
            global left
            if event.startswith(("open", "os.", "shutil", "half", "ctypes.dlsym")):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        room.export(gemma, folder, "peft", verify=False)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    found = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    outcomes.append("old" if found == before else "new" if found == new else "half")
    if not killed:
        break
print(" ".join(outcomes))
"""


def test_an_export_killed_at_any_point_leaves_the_old_folder_or_the_new_one(old, tiny, tmp_path):
    """A process is killed at its first step in the file system, at its second, and so on."""
    told = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny), str(old), str(tmp_path / "folder")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
        },
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    outcomes = told.stdout.split()
    assert len(outcomes) > 12
    assert set(outcomes[:-1]) == {"old", "new"} and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, reverse=True), "first the old one, then the new"
    export(g4.load(tiny, adapter=old), tmp_path / "folder", verify=False)
    assert not list(tmp_path.glob(".partial-*"))


# ---------------------------------------------------------------- a base that no adapter loads onto


@pytest.fixture(scope="module")
def audible(checkpoints, tmp_path_factory) -> Path:
    """E2B with an audio encoder, which mlx-vlm 0.7 cannot freeze."""
    return as_others_load_it(checkpoints["e2b"], tmp_path_factory.mktemp("a") / "e2b", audio=True)


def test_where_the_library_takes_no_adapter_the_rules_are_the_proof(audible, tmp_path):
    gemma = trained(audible, KINDS["lora"])
    format = "mlx-vlm-legacy" if ADAPTERS["mlx-vlm"].library.unfit() else "mlx-vlm"
    (proof,) = export(gemma, tmp_path / "out", format)
    told = rf"{format}: \d+ tensors"
    stuck = (
        r" keep the format's rules; not run: mlx-vlm \S+ takes no adapter for this base: \S+: .+"
    )
    works = r", loaded by mlx-vlm .*"  # before 0.7
    assert re.fullmatch(told + (works if proof.by else stuck), str(proof)), proof
    if importlib.metadata.version("mlx_vlm").startswith("0.7."):
        assert "_no_grad" in proof.why_not
    assert_same(trainable(g4.load(audible, tmp_path / "out")), trainable(gemma))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_fails_there_too(audible, tmp_path, monkeypatch, fault):
    gemma = trained(audible, KINDS["lora"])
    write = ADAPTERS["mlx-vlm"].write

    def wrong(adapter):
        config, weights = json.loads(json.dumps(write(adapter)[0])), dict(write(adapter)[1])
        if fault == "key":
            config["lora_parameters"]["keys"].pop()
        else:
            FAULTS[fault](config, weights)
        return config, weights

    monkeypatch.setattr(ADAPTERS["mlx-vlm"], "write", wrong)
    with pytest.raises(g4.ExportError):
        export(gemma, tmp_path / "out", "mlx-vlm")
    assert not list(tmp_path.iterdir())


class Stuck(Broken):
    def prepare(self, model):
        raise AttributeError("no _no_grad")


def test_only_a_library_that_cannot_begin_is_excused(gemma, old, monkeypatch):
    monkeypatch.setattr(ADAPTERS["mlx-lm"], "library", Stuck(gemma))
    (proof,) = export(gemma, old)
    assert proof.by is None and "takes no adapter for this base" in proof.why_not
    monkeypatch.setattr(ADAPTERS["mlx-lm"], "library", Broken(gemma))
    assert "does not load" in refused(gemma, old)


# ---------------------------------------------------------------- no code of the folder


def test_libraries_are_told_to_run_no_code_of_the_folder(tiny, others, monkeypatch):
    def newer(base, trust_remote_code=False):
        told.append(trust_remote_code)
        raise InterruptedError

    def older(base):
        told.append("it does not take it")
        raise InterruptedError

    def any_option(base, lazy=False, **options):
        told.append(options["trust_remote_code"])
        raise InterruptedError

    told = []
    for function in (newer, older):
        monkeypatch.setattr("mlx_lm.utils.load_model", function)
        with pytest.raises(InterruptedError):
            ADAPTERS["mlx-lm"].library.load(others["e2b"])
    monkeypatch.setattr("mlx_vlm.utils.load_model", any_option)
    with pytest.raises(InterruptedError):
        ADAPTERS["mlx-vlm"].library.load(others["e2b"])
    assert told == [False, "it does not take it", False]


@pytest.mark.parametrize("causal", [False, True])
def test_transformers_is_told_so_too(others, monkeypatch, causal):
    import transformers

    told = []

    def config(base, **options):
        told.append(options)
        return SimpleNamespace(text_config=None)

    def model(base, **options):
        told.append(options)
        raise InterruptedError

    name = architecture(Plan.from_config(read_config(others["e2b"])), causal)
    cls = SimpleNamespace(from_pretrained=model)
    monkeypatch.setattr(transformers, name, cls, raising=False)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    with pytest.raises(InterruptedError):
        TransformersLibrary(causal).load(others["e2b"])
    assert [options["trust_remote_code"] for options in told] == [False] * (1 + causal)
