import pytest
import torch
from torch import nn

from utilized_rank.networks.evaluation import features, is_correct, outputs


def test_outputs_are_those_of_evaluation_mode_whatever_the_batches(make, images):
    network = make("residual")
    dropped = nn.Sequential(network, nn.Dropout(0.5)).train()
    expected = network(images)
    for size in (1, 32, 70, 1000):
        torch.testing.assert_close(outputs(dropped, images, size), expected, rtol=0, atol=1e-5)


def test_correct_is_where_the_largest_logit_is_the_label():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    correct = is_correct(nn.Identity(), logits, torch.tensor([1, 1, 2]))
    assert correct.tolist() == [True, False, True]


def test_features_are_what_flows_into_the_classifier(make, images):
    network = make("residual")
    flowing = features(network, network.head, images)
    assert flowing.shape == (70, 8)
    torch.testing.assert_close(network.head(flowing), network(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("residual", "stem", (3, 8, 8)),
        ("residual", "conv2", (8, 8, 8)),
        ("vit", "blocks.1.mlp.fc2", (5, 96)),
        ("resnet20", "layer2.0", (4, 8, 8)),
    ],
)
def test_features_are_what_flows_into_any_module(make, images, name, module, shape):
    network = make(name)
    part = network.get_submodule(module)
    seen = []
    handle = part.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
    with torch.inference_mode():
        network(images)
    handle.remove()
    flowing = features(network, part, images)
    assert flowing.shape == (70, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(part(flowing), seen[0], rtol=0, atol=1e-5)


def test_features_leave_no_hook_behind_even_when_the_network_raises(make, images):
    network = make("residual")
    features(network, network.head, images)
    with pytest.raises(RuntimeError):
        features(network, network.head, images[:, :1])
    assert not network.head._forward_pre_hooks
