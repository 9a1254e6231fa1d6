"""Linears on oneDNN: the same answers, for whom they are, and for whom not."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional

from reasonedit.reasonedit_core.kernels import explain, hasten, linear, linear_gelu
from reasonedit.reasonedit_core.kernels.linear import QuickLinear
from reasonedit.reasonedit_core.models.halves import feed_forward, project_halves

needs_operator = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this torch does not offer oneDNN's product",
)


@pytest.fixture
def quick(monkeypatch):
    """As on a processor that MKL does not know."""
    monkeypatch.setattr(linear, "lacking", lambda: None)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_operator
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7, 48), (2, 3, 48), (5, 48), (48,)])
def test_products_are_those_of_torch(quick, bias, shape):
    plain = nn.Linear(48, 40, bias=bias)
    fast = copy.deepcopy(plain)
    assert hasten(fast) == 1 and type(fast) is QuickLinear and isinstance(fast, nn.Linear)
    x = draw(*shape)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
        wanted = functional.gelu(plain(x), approximate="tanh")
        torch.testing.assert_close(fast.gelu(x), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(linear_gelu(fast, x), wanted, rtol=1e-5, atol=1e-6)
    assert list(fast.state_dict()) == list(plain.state_dict())


@needs_operator
def test_what_the_operator_is_not_for_takes_torchs_own_way(quick, monkeypatch):
    fast = nn.Linear(6, 4)
    hasten(fast)
    monkeypatch.setattr(linear, "_product", lambda *args: pytest.fail("called the operator"))
    x = draw(3, 6)
    fast(x).sum().backward()
    assert fast.weight.grad is not None, "gradients are computed"
    with torch.no_grad():
        assert fast(x[:0]).shape == (0, 4)
        half = copy.deepcopy(fast).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert fast.to("meta")(x.to("meta")).device.type == "meta"


@needs_operator
def test_only_plain_float32_linears_on_the_cpu_are_changed(quick):
    class Own(nn.Linear):
        pass

    net = nn.ModuleList(
        [nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).bfloat16(), nn.Conv1d(4, 4, 1), nn.Linear(4, 4, device="meta")]
    )
    assert hasten(net) == 1 and [type(each) for each in net] == [QuickLinear, Own, nn.Linear, nn.Conv1d, nn.Linear]
    assert hasten(net) == 0, "a second time there is nothing left"


def test_a_machine_that_lacks_something_keeps_its_linears_and_says_why(monkeypatch):
    net = nn.Linear(4, 4)
    monkeypatch.setattr(linear, "_maker", lambda: "GenuineIntel")
    linear._lacking.cache_clear()
    try:
        if torch.backends.mkl.is_available():
            assert "at home on this processor (GenuineIntel)" in linear.lacking()
            assert "torch's own; oneDNN: MKL is at home" in explain("cpu")
        assert hasten(net) == 0 and type(net) is nn.Linear
    finally:
        linear._lacking.cache_clear()


@pytest.fixture
def amd(monkeypatch):
    """A processor that MKL does not know, a torch that has MKL and oneDNN; nothing remembered, before or after."""
    monkeypatch.setattr(linear, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    linear._lacking.cache_clear()
    yield
    linear._lacking.cache_clear()


def refused(words):
    net = nn.Linear(4, 4)
    assert linear.lacking() == words
    assert hasten(net) == 0 and type(net) is nn.Linear


@needs_operator
def test_such_a_processor_with_the_operator_takes_it(amd):
    assert linear.lacking() is None
    assert "float32 products on cpu: oneDNN would run" in explain("cpu")


def test_a_torch_without_mkl_needs_no_other_product(amd, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    refused("torch does not multiply with MKL here")


def test_a_torch_without_onednn_says_so(amd, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    refused(f"torch {torch.__version__} does not offer oneDNN's product")


def test_a_torch_without_the_operator_says_so(amd, monkeypatch):
    """`torch.ops.mkldnn` makes its operators when they are asked for, so the whole namespace is hidden."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    refused(f"torch {torch.__version__} does not offer oneDNN's product")


@needs_operator
def test_an_operator_of_another_signature_says_so(amd, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=lambda x, weight: x))
    assert linear.lacking().startswith("oneDNN's product cannot be called (")
    linear._lacking.cache_clear()
    monkeypatch.setattr(linear, "_product", lambda *args: torch.ops.mkldnn._no_such_operator())
    assert "_no_such_operator" in linear.lacking() and hasten(nn.Linear(4, 4)) == 0


@needs_operator
def test_an_operator_that_is_wrong_says_so(amd, monkeypatch):
    monkeypatch.setattr(linear, "_product", lambda x, weight, bias, *how: functional.linear(x, weight, bias) + 1)
    refused("oneDNN's product failed its test here")


def test_kernels_switched_off_keep_linears_too(monkeypatch):
    monkeypatch.setenv("REASONEDIT_KERNELS", "off")
    assert linear.lacking() == "REASONEDIT_KERNELS=off" and hasten(nn.Linear(2, 2)) == 0


@needs_operator
@torch.no_grad()
def test_the_products_around_gelu_are_fused_and_equal(quick, monkeypatch):
    plain = FeedForward(dim=8, dim_out=8, activation_fn="gelu-approximate").eval()
    fast, x, first = copy.deepcopy(plain), draw(2, 5, 8), draw(2, 5, 4, seed=1)
    assert hasten(fast) == 2
    torch.testing.assert_close(feed_forward(fast, x), plain(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(feed_forward(plain, x), plain(x))
    out, mlp = nn.Linear(16, 8), nn.Linear(8, 12)
    wanted = project_halves(out, first, mlp, x)
    hasten(out, mlp)
    torch.testing.assert_close(project_halves(out, first, mlp, x), wanted, rtol=1e-5, atol=1e-6)
    exact = FeedForward(dim=8, dim_out=8, activation_fn="gelu").eval()  # another GELU is left alone
    hasten(exact)
    monkeypatch.setattr(QuickLinear, "gelu", lambda *args: pytest.fail("fused another GELU"))
    feed_forward(exact, x)


@needs_operator
@torch.no_grad()
def test_hooks_of_a_layer_are_called(quick):
    layer, seen = nn.Linear(4, 4), []
    hasten(layer)
    layer.register_forward_hook(lambda *args: seen.append(1))
    linear_gelu(layer, draw(2, 4))
    assert seen == [1]


@needs_operator
def test_adapters_go_around_it(quick):
    from peft import LoraConfig, inject_adapter_in_model

    net = nn.Sequential(nn.Linear(4, 4))
    hasten(net)
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net)
    x = draw(3, 4)
    with torch.no_grad():
        assert type(net[0].base_layer) is QuickLinear and not torch.allclose(net(x), net[0].base_layer(x))
        torch.testing.assert_close(
            net(x), net[0].base_layer(x) + net[0].lora_B["default"](net[0].lora_A["default"](x)) * net[0].scaling["default"]
        )


@needs_operator
def test_it_compiles_as_a_plain_linear(quick):
    layer = nn.Linear(4, 4)
    hasten(layer)
    x = draw(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
