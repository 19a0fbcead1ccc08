"What page model_lora_forward does not show: number formats, and every kind of layer that goes PEFT's own way."
import copy

import pytest
import torch
from sdxl_course.core import seeded
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.architecture import tiny_architecture
from sdxl_course.model import lora_forward as room
from sdxl_course.model.lora_forward import OnePassLinear, use_one_pass, one_path, through
from torch import nn


class Block(nn.Module):
    "Two layers, one of them with a bias, and what diffusers' models have."
    def __init__(self):
        super().__init__()
        self.to_q, self.to_v = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)
        for name, p in self.named_parameters(): p.data.normal_(generator=seeded("block", name))

    def forward(self, x): return self.to_v(self.to_q(x).relu())


def pair(dtype=torch.float32, **options):
    "The same block with PEFT's layers and with ours."
    import peft
    block = Block().requires_grad_(False).to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_v"], **options)
    block = peft.inject_adapter_in_model(config, block)
    for name, p in lora_parameters(block): p.data = torch.randn(p.shape, generator=seeded(name))
    return block, use_one_pass(copy.deepcopy(block))


def run(block, x, auto=None):
    "Output, gradient of the input, gradients of the parameters."
    x = x.detach().requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", auto, enabled=auto is not None): out = block(x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for _, p in lora_parameters(block))]


X = torch.randn(2, 7, 6, generator=seeded("x"))


def test_output_and_gradients_are_pefts():
    for ours, theirs in zip(*(run(block, X) for block in reversed(pair()))): torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_they_are_as_near_to_the_truth_and_in_the_same_formats():
    (plain, ours), exact = pair(), run(pair()[0], X)
    error = lambda found: sum(float((one - true).norm() / true.norm()) for one, true in zip(found, exact))
    theirs, ours = run(plain, X, torch.bfloat16), run(ours, X, torch.bfloat16)
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    assert 0 < error(ours) < 1.3 * error(theirs)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_dropout=0.5), dict(lora_bias=True)], ids=str)
def test_what_else_a_layer_does_it_does_as_before(options):
    plain, ours = pair(**options)
    assert one_path(ours.to_q, X) is None
    found = []
    for block in (plain, ours):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(run(block, X))
    for ours, theirs in zip(*found): assert torch.equal(ours, theirs)


def test_dropout_is_idle_in_a_model_that_does_not_train():
    ours = pair(lora_dropout=0.5)[1]
    assert one_path(ours.eval().to_q, X) == "default" and one_path(ours.train().to_q, X) is None


@pytest.mark.parametrize("change", ["enable_adapters", "merge", "another", "half", "trains"])
def test_the_state_of_a_layer_is_asked_each_time(change):
    plain, ours = pair(torch.bfloat16 if change == "half" else torch.float32)
    x = X.bfloat16() if change == "half" else X
    if change != "half": assert one_path(ours.to_q, x) == "default"
    for block in (plain, ours):
        for layer in (block.to_q, block.to_v):
            if change == "enable_adapters": layer.enable_adapters(False)
            if change == "merge": layer.merge()
            if change == "trains": layer.base_layer.weight.requires_grad_(True)
    if change == "another":
        import peft
        for block in (plain, ours):
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]), block, "second")
            for layer in (block.to_q, block.to_v):
                for one in (layer.lora_A, layer.lora_B): one["second"].weight.data.fill_(0.1)
                layer.set_adapter(["default", "second"])
    assert one_path(ours.to_q, x) is None
    assert torch.equal(plain(x), ours(x))


def test_attention_of_which_only_a_part_has_a_lora(monkeypatch):
    plain = add_lora(tiny_architecture(0).unet, rank=2, layers="to_q,to_v", generator=seeded("part"))
    for name, p in lora_parameters(plain): p.data.normal_(generator=seeded(name))
    model, given, short = use_one_pass(copy.deepcopy(plain)), dict(text_embeds=torch.ones(1, 128), time_ids=torch.ones(1, 6)), []
    monkeypatch.setattr(room, "through", lambda *more: short.append(1) or through(*more))
    draw = lambda unet: unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 192), added_cond_kwargs=given).sample
    ours, theirs = (draw(unet).detach() for unet in (model, plain))
    assert len(short) == sum(isinstance(layer, OnePassLinear) for layer in model.modules()) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_drawing_keeps_pefts_own_way(monkeypatch):
    model = use_one_pass(add_lora(tiny_architecture(0).unet, rank=2, generator=seeded("drawing")))
    monkeypatch.setattr(room, "through", None)  # calling it would fail
    given = dict(text_embeds=torch.ones(1, 128), time_ids=torch.ones(1, 6))
    with torch.no_grad(): model(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 192), added_cond_kwargs=given)
    with pytest.raises(TypeError): model(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 192), added_cond_kwargs=given)


def test_names_and_files_stay(tmp_path):
    plain, ours = pair()
    assert isinstance(ours.to_q, OnePassLinear) and list(plain.state_dict()) == list(ours.state_dict())
    torch.save(ours, tmp_path / "model.pt")
    assert type(torch.load(tmp_path / "model.pt", weights_only=False).to_q) is OnePassLinear
