"""Checkpoints: what was saved is loaded; what cannot be loaded says why, and runs nothing."""

import json

import huggingface_hub.constants
import pytest
import torch
from transformers import T5Config

from drgr.errors import ConfigError
from drgr.models import load_pretrained


@pytest.fixture
def saved(build_family, tmp_path):
    model = build_family("olmoe").eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_loads_what_was_saved(family, build_family, tmp_path):
    model = build_family(family).eval()
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.training
    ids = torch.randint(2, 64, (2, 8))
    output = loaded.eval()(input_ids=ids)
    assert output.past_key_values is None
    assert torch.equal(output.logits, model(input_ids=ids).logits)


def test_loads_half_precision_in_float32(saved):
    model, path = saved
    model.to(torch.bfloat16).save_pretrained(path)
    loaded = load_pretrained(str(path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_a_loaded_model_generates_with_the_cache_and_saves_again(saved, tmp_path):
    loaded = load_pretrained(str(saved[1])).eval()
    ids = torch.randint(2, 64, (1, 6))
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": 4, "max_new_tokens": 4}
    lengths = []
    loaded.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = loaded.generate(ids, do_sample=False, pad_token_id=1, **options)
    assert lengths == [6, 1, 1, 1]
    loaded.save_pretrained(tmp_path / "again")
    again = load_pretrained(str(tmp_path / "again")).eval()
    assert torch.equal(first, again.generate(ids, do_sample=False, pad_token_id=1, **options))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c"])
def test_a_missing_directory_is_named(name):
    with pytest.raises(
        ConfigError, match=f"existing directory or a hub name.*{name}.*no directory"
    ):
        load_pretrained(name)


def test_a_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model 'owner/absent' must be .* OSError: .* a network"):
        load_pretrained("owner/absent")


def test_an_empty_directory(tmp_path):
    with pytest.raises(
        ConfigError, match=r"must be a causal language model .* got ValueError: Unrecog"
    ):
        load_pretrained(str(tmp_path))


def test_a_model_of_another_kind(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"must be a causal language model .* ValueError"
    ) as raised:
        load_pretrained(str(tmp_path))
    assert len(str(raised.value)) < 600


def test_a_truncated_file(saved):
    _, path = saved
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"known to transformers, got SafetensorError"):
        load_pretrained(str(path))


def test_weights_of_other_sizes(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 65}))
    with pytest.raises(ConfigError, match=r"in which 2 are missing or of another shape \(lm_head"):
        load_pretrained(str(path))


def test_a_checkpoint_without_its_head(saved):
    model, path = saved
    model.model.save_pretrained(path)
    with pytest.raises(
        ConfigError,
        match=r"must hold every weight.*in which 1 are missing or of another shape \(lm_head",
    ):
        load_pretrained(str(path))


def test_pickled_weights_are_not_read(saved):
    model, path = saved
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="in safetensors format"):
        load_pretrained(str(path))


def test_code_beside_a_checkpoint_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    code = f"open({str(trace)!r}, 'w').close()\n"
    (tmp_path / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    config = {"model_type": "own", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="must be a causal language model"):
        load_pretrained(str(tmp_path))
    assert not trace.exists()
