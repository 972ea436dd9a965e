import pytest
import torch
from torch import nn

from utilized_rank.evaluation import features, is_correct, outputs


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


def test_features_leave_no_hook_behind_even_when_the_network_raises(make, images):
    network = make("residual")
    features(network, network.head, images)
    with pytest.raises(RuntimeError):
        features(network, network.head, images[:, :1])
    assert not network.head._forward_pre_hooks
