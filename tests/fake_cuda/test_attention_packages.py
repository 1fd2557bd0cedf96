"""What we call of the attention packages fits their releases; `test_waits.py` calls them so, in a whole step."""

import importlib.util
import inspect

import pytest

from fake_cuda.flash import VERSION_2, VERSION_3, VERSION_4, VERSION_4_BACKWARD, signature

# By module and function, the parameters as read from the release (`flash.py` says which).
READ = {
    ("flash_attn", "flash_attn_varlen_func"): VERSION_2,
    ("flash_attn_interface", "flash_attn_varlen_func"): VERSION_3,
    ("flash_attn.cute.interface", "_flash_attn_fwd"): VERSION_4,
    ("flash_attn.cute.interface", "_flash_attn_bwd"): VERSION_4_BACKWARD,
}


@pytest.mark.parametrize(("module", "function"), READ)
def test_what_is_installed_has_the_parameters_that_were_read(module: str, function: str) -> None:
    """On a machine with a GPU; elsewhere the sources were read, and nothing more."""
    try:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: its signature was only read")
        installed = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported: {error}")
    theirs = inspect.signature(getattr(installed, function)).parameters
    gone = signature(READ[module, function]).parameters.keys() - theirs.keys()
    assert not gone, f"{module}.{function} has no {gone} any more"


def test_torch_takes_what_varlen_attention_is_given() -> None:
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert parameters["window_size"].kind is inspect.Parameter.KEYWORD_ONLY
