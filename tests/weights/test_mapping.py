"""Files in memory: mapped and used in place, or read."""

import numpy as np
import pytest
from tiny_models import Tiny, tensors_of

from pyggml_adapt.errors import AdaptorError, ClosedError
from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.mapping import MappedFile

TINY = {"type": "Q4_0", "n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 64, "n_layer": 1}


def open_file(path, **options):
    with GGUFReader(path) as reader:
        return MappedFile(reader.path, reader.tensors.values(), **options)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_tensors_are_the_files(tiny_gguf, use_mmap):
    path = tiny_gguf(**TINY)
    file = open_file(path, use_mmap=use_mmap)
    expected = tensors_of(Tiny(**TINY))
    assert set(file.tensors) == set(expected)
    for name, (type, ne, data) in expected.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.type, tensor.ne[: len(ne)]) == (name, type, ne)
        assert tensor.get_data(bytearray(len(data))) == bytes(data)
    assert file.nbytes == sum(len(data) for *_, data in expected.values())
    assert file.is_mapped is use_mmap
    file.close()


def test_mapped_in_place(tiny_gguf):
    path = tiny_gguf(**TINY)
    file = open_file(path)
    low, high = file.address_range()
    size = path.stat().st_size
    assert high - low == size
    with open("/proc/self/maps") as maps:
        (line,) = (line for line in maps if path.name in line)
    assert line.split()[1].startswith("r--") and int(line.split("-")[0], 16) == low
    file.close()
    with open("/proc/self/maps") as maps:
        assert path.name not in maps.read()


def test_read_without_a_mapping(tiny_gguf):
    path = tiny_gguf(**TINY)
    file = open_file(path, use_mmap=False)
    low, high = file.address_range()
    assert 0 < high - low < path.stat().st_size  # the header is not kept
    with open("/proc/self/maps") as maps:
        assert path.name not in maps.read()
    file.close()


def test_closed(tiny_gguf):
    file = open_file(tiny_gguf(**TINY))
    tensor = file.tensors["token_embd.weight"]
    file.close()
    file.close()
    with pytest.raises(ClosedError, match="closed"):
        tensor.to_numpy()


def test_large_metadata_is_read_when_it_is_asked_for(tiny_gguf):
    file = Foundation(tiny_gguf(**TINY))
    assert "tokenizer.ggml.tokens" not in file.metadata
    assert file.metadata["tokenizer.ggml.model"] == "llama"
    assert file.metadata["llama.block_count"] == 1
    assert len(file.full_metadata()["tokenizer.ggml.tokens"]) > 256
    file.close()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_writing_to_weights_is_refused(tiny_gguf, use_mmap):
    file = open_file(tiny_gguf(**TINY), use_mmap=use_mmap)
    tensor = file.tensors["output_norm.weight"]
    with pytest.raises(Exception, match="read-only") as error:
        tensor.set_data(np.zeros(64, np.float32))
    assert type(error.value).__module__ == "pyggml_adapt.errors"
    file.close()


def test_foundation(tiny_gguf, split_models):
    models = {"a": tiny_gguf(**TINY), "b": tiny_gguf(**TINY, changed={"attn_q": 1})}
    path, adaptors = split_models(models)
    whole, part = Foundation(models["a"]), Foundation(path)
    assert whole.is_complete and not part.is_complete
    assert set(whole.tensors) - set(part.tensors) == {"blk.0.attn_q.weight"}
    whole.close()
    part.close()
    with pytest.raises(AdaptorError, match="not a foundation or a complete model") as error:
        Foundation(adaptors["a"])
    assert error.value.code == "adaptor_invalid"
