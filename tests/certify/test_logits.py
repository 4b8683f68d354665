"""Models of transformers and modules that return more than logits, smoothed as they are."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_certify import SmoothedClassifier, UnsupportedModelError
from hf_certify.noise import Stage, draw_noise
from tests.certify.toy_models import half_space

X = torch.linspace(0.0, 1.0, 192).reshape(3, 8, 8)


class ByHand(nn.Module):
    """The logits of a transformers model, for one way to call it."""

    def __init__(self, model, name, dtype):
        super().__init__()
        self.model, self.name, self.dtype = model, name, dtype

    def forward(self, x):
        return self.model(**{self.name: x.to(self.dtype)}).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_model_is_smoothed_without_a_wrapper(vit_pipeline, dtype):
    """Oracle: a wrapper written by hand, and the number of classes given."""
    model = vit_pipeline.model.to(dtype)
    by_hand = ByHand(model, "pixel_values", dtype).eval()
    expected = SmoothedClassifier(by_hand, sigma=0.5, num_classes=3, seed=1).certify(X, n=400)
    assert SmoothedClassifier(model, sigma=0.5, seed=1).certify(X, n=400) == expected
    assert min(expected.estimation) > 0


def test_a_text_model_gets_its_noise_on_the_embeddings():
    """Oracle: votes on the noise itself, counted by hand."""
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(**settings, vocab_size=20, num_labels=4, initializer_range=0.5)
    model = BertForSequenceClassification(config).eval()
    x = model.get_input_embeddings()(torch.arange(6)).detach()
    prediction = SmoothedClassifier(model, sigma=0.5, seed=3, batch_size=50).predict(x, n=50, index=2)
    noise = torch.cat([chunk.clone() for chunk in draw_noise((6, 8), 50, seed=3, index=2, stage=Stage.PREDICTION)])
    with torch.inference_mode():
        votes = model(inputs_embeds=x + 0.5 * noise).logits.argmax(-1)
    assert list(prediction.counts) == votes.bincount(minlength=4).tolist()


def test_a_module_that_returns_an_object_with_logits_is_accepted():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = half_space()

        def forward(self, x):
            return ImageClassifierOutput(logits=self.inner(x))

    x = 0.1 * torch.ones(12)
    expected = SmoothedClassifier(half_space(), sigma=0.5, num_classes=2, seed=1).certify(x, n=400)
    assert SmoothedClassifier(Wrapped().eval(), sigma=0.5, num_classes=2, seed=1).certify(x, n=400) == expected


def test_without_a_config_the_number_of_classes_must_be_given():
    with pytest.raises(TypeError, match=r"num_classes must be an int >= 2, got None .* whose config has num_labels"):
        SmoothedClassifier(half_space(), sigma=0.5)


def test_a_module_that_is_trained_after_all_is_named_as_the_user_knows_it(vit_pipeline):
    smoothed = SmoothedClassifier(vit_pipeline.model, sigma=0.5, seed=1)
    vit_pipeline.model.classifier.train()
    with pytest.raises(UnsupportedModelError, match=r"in training mode \(first: 'classifier'\)"):
        smoothed.predict(X, n=20)
