"""Generation: samples come from the head's exact distribution."""

import pytest
import torch
from scipy import stats

import uncork
from uncork.lab.data.tokenization import BPETokenizer, WordTokenizer
from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, TransformerConfig, build_model
from uncork.lab.train.generation import generate, prompt_ids, sample_ids

V, D = 12, 4
LSTM = AWDLSTMConfig(embedding_size=6, hidden_sizes=(8,), out_features=D)
TRANSFORMER = TransformerConfig(width=8, depth=1, num_heads=2, max_length=16, out_features=D)
HEADS = [("softmax", {}), ("plif-frozen", {"spread": 1.0, "bound": 3.0}), ("mos", {})]


def make_model(head="softmax", config=LSTM, **options):
    torch.manual_seed(0)
    model = build_model(config, uncork.build_head(head, D, V, **options), V)
    for parameter in model.head.parameters():
        parameter.data.mul_(4.0)
    # Left in training mode: sampling must switch dropout off by itself.
    return model.train()


def distribution(model, prompt):
    with torch.no_grad():
        return model.eval().head(model.features(torch.tensor([prompt]))[0][0, -1]).double().softmax(-1)


def draws(model, prompt, count, **options):
    return [next(sample_ids(model, prompt, max_tokens=1, seed=seed, **options)) for seed in range(count)]


def chi_square(ids, expected):
    """p-value of the draws under the distribution, the words that are too rare for the test taken together."""
    counts, wanted = torch.bincount(torch.tensor(ids), minlength=V).double(), expected * len(ids)
    rare = wanted < 5
    if rare.any():
        counts, wanted = (torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts, wanted))
    return stats.chisquare(counts.numpy(), wanted.numpy()).pvalue


@pytest.mark.parametrize(("head", "options"), HEADS)
def test_sampled_frequencies_are_the_models_distribution(head, options):
    model = make_model(head, **options)
    expected = distribution(model, [3, 1, 4])
    ids = draws(model, [3, 1, 4], 800)
    assert chi_square(ids, expected) > 0.001
    # The same test tells a neighbouring distribution apart.
    wrong = (expected.log() * 1.6).softmax(-1)
    assert chi_square(ids, wrong) < 1e-6


def test_temperature_top_k_and_top_p():
    model = make_model("plif-frozen", bound=3.0)
    expected = distribution(model, [3, 1, 4])
    order = expected.argsort(descending=True).tolist()
    cold = (expected.log() / 0.5).softmax(-1)
    assert chi_square(draws(model, [3, 1, 4], 500, temperature=0.5), cold) > 0.001
    assert set(draws(model, [3, 1, 4], 200, top_k=2)) == set(order[:2])
    share = expected[order[:3]].sum().item()
    assert set(draws(model, [3, 1, 4], 300, top_p=share - 1e-6)) == set(order[:3])
    assert set(draws(model, [3, 1, 4], 300, top_p=1e-9)) == {order[0]}
    assert set(draws(model, [3, 1, 4], 20, temperature=1e-300)) == {order[0]}


@pytest.mark.parametrize("config", [LSTM, TRANSFORMER])
@pytest.mark.parametrize(("head", "options"), HEADS)
def test_greedy_is_top_1_is_predict(head, options, config):
    model = make_model(head, config, **options)
    greedy = list(sample_ids(model, [3, 1, 4], max_tokens=10, temperature=0))
    assert greedy == list(sample_ids(model, [3, 1, 4], max_tokens=10, top_k=1))
    ids = [3, 1, 4]
    model.eval()
    for _ in range(10):
        features, _ = model.features(torch.tensor([ids]))
        ids.append(model.head.predict(features[0, -1]).item())
    assert greedy == ids[3:]


def test_a_saturated_function_does_not_change_the_likeliest_word():
    model = make_model("softcap", cap=0.01)
    model.head.weight.data.mul_(100)
    plain = make_model("softmax")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "head.head_spec"})
    for options in ({"temperature": 0}, {"top_k": 1}):
        assert list(sample_ids(model, [1], max_tokens=8, **options)) == list(
            sample_ids(plain, [1], max_tokens=8, temperature=0)
        )


def test_a_transformer_reads_its_window_again():
    model = make_model(config=TRANSFORMER)
    long = [i % V for i in range(40)]
    assert list(sample_ids(model, long, max_tokens=1, window=5, seed=3)) == list(
        sample_ids(model, long[-5:], max_tokens=1, window=5, seed=3)
    )
    assert len(list(sample_ids(model, long, max_tokens=30, window=16))) == 30
    with pytest.raises(LabError, match="max_length"):
        list(sample_ids(model, long, max_tokens=1, window=17))


def test_the_same_seed_gives_the_same_text_and_leaves_everything_as_it_was():
    model, before = make_model(), torch.get_rng_state()
    texts = [list(sample_ids(model, [1], max_tokens=30, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_generate_writes_prompt_and_continuation():
    words = [f"w{chr(97 + i)}" for i in range(V - 2)]
    tokenizer = WordTokenizer(["<unk>", "<eos>", *words], "raw")
    model = make_model()
    text = generate(model, tokenizer, "Wa unheard wc", max_tokens=5, seed=1)
    sampled = list(sample_ids(model, [2, 0, 4], max_tokens=5, seed=1))
    assert text == tokenizer.decode([2, 0, 4, *sampled])
    assert text.startswith("wa <unk> wc")
    assert generate(model, tokenizer, max_tokens=5, seed=1) == tokenizer.decode(
        list(sample_ids(model, [1], max_tokens=5, seed=1))
    )
    assert prompt_ids(tokenizer, "wa\nwb") == [2, 1, 3]
    assert prompt_ids(tokenizer, "wa\nwb\n") == [2, 1, 3, 1]


def test_subwords_have_no_unknown_word():
    tokenizer = BPETokenizer.train(["low lower lowest"] * 9, "raw", vocab_size=260)
    with pytest.raises(LabError, match="prompt: expected UTF-8 text, got a byte that is none at character 5"):
        prompt_ids(tokenizer, "the \udcff king")
    ids = prompt_ids(tokenizer, "Größe low")
    assert tokenizer.decode(ids) == "Größe low"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"window": 0}, "window"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(LabError, match=message):
        sample_ids(make_model(), **{"prompt": [1], "max_tokens": 3, **options})
