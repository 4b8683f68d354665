"""The examples, at a size of seconds: what they train, save, generate and draw is what they say."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import hf_chainattn  # noqa: F401  registers attn_implementation="chain"
from examples.chainattn import generate, train
from examples.chainattn.programs import LINE, mixed_programs, new_tokenizer, sample_programs
from examples.chainattn.runs import Run, results
from examples.chainattn.tables import chaintrack_tables, program_tables
from hf_chainattn.tasks import accuracy_by_depth, sample_chain_track

SMALL = ["--models", "chain-1", "sdpa-2", "--seeds", "1", "--jobs", "1"]


def interpreted(words):
    """Run a program line by line with a dictionary; return what each line puts into its name, and how deep it lay."""
    held = {}
    for begin in range(0, len(words), LINE):
        source, to, name, end = words[begin : begin + LINE]
        assert (to, end) == (">", ";")
        assert name not in held
        digit, depth = (source, -1) if source.isdigit() else held[source]
        held[name] = digit, depth + 1
    return zip(*held.values(), strict=True)


@settings(max_examples=30)
@given(
    lines=st.integers(6, 27),
    chains=st.integers(1, 6),
    fresh=st.sampled_from([0.0, 0.3, 1.0]),
    branching=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_answers_and_depths_follow_from_the_text_of_a_program(lines, chains, fresh, branching, seed):
    """Oracle: an interpreter of the text that the tokenizer writes."""
    programs = sample_programs(
        3,
        lines=lines,
        chains=chains,
        fresh=fresh,
        branching=branching,
        generator=torch.Generator().manual_seed(seed),
    )
    tokenizer = new_tokenizer()
    for ids, labels, depth in zip(*programs, strict=True):
        text = tokenizer.decode(ids)
        assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"][0], ids)
        digits, depths = interpreted(text.split())
        assert tuple(tokenizer.decode(labels[LINE - 1 :: LINE]).split()) == digits
        assert bool((labels.view(-1, LINE)[:, :-1] == -100).all())
        assert tuple(depth.tolist()) == depths
        sources = text.split()[0::LINE]
        assert len({source for source in sources[:chains] if source.isdigit()}) == chains
        if fresh in (0.0, 1.0):
            assert all(source.isdigit() == (fresh == 1.0) for source in sources[chains:])
        if fresh == branching == 0.0:
            # each name is copied once at most where only the newest of a chain is
            copied = sources[chains:]
            assert len(set(copied)) == len(copied)
    assert torch.equal(programs.answers, programs.labels[programs.labels != -100].view(3, lines))


def test_programs_to_train_with_are_of_one_to_six_chains():
    programs = mixed_programs(47, lines=8, seed=0)
    assert all(len(field) == 47 for field in programs)
    begins = [next((place for place, depth in enumerate(row.tolist()) if depth), 8) for row in programs.depth]
    assert {1, 2, 3, 4, 5, 6} <= set(begins)


def test_a_program_has_no_more_lines_than_names():
    for sizes in ({"lines": 28, "chains": 2}, {"lines": 5, "chains": 6}, {"lines": 12, "chains": 11}):
        with pytest.raises(ValueError, match="1 <= chains <= lines <= 27"):
            sample_programs(1, fresh=0.0, generator=torch.Generator(), **sizes)


@pytest.fixture
def small_tracking(monkeypatch):
    monkeypatch.setattr(train, "TRAINING_SEQUENCES", 64)
    monkeypatch.setattr(train, "TEST_SEQUENCES", 16)


def test_training_writes_models_that_give_the_accuracies_it_tells(small_tracking, tmp_path, capsys):
    """Oracle: the saved models, loaded here and counted token by token."""
    train.main([*SMALL, "--steps", "4", "--deep-steps", "3", "--out", str(tmp_path)])
    run = json.loads((tmp_path / "chaintrack.json").read_text("utf8"))
    assert run["facts"]["threads"] == 1
    assert {(row["attention"], row["layers"], row["steps"]) for row in run["rows"]} == {
        ("chain", 1, 4),
        ("sdpa", 2, 3),
    }
    for row in run["rows"]:
        folder = tmp_path / f"{row['attention']}-{row['layers']}-{row['steps']}-0"
        config = json.loads((folder / "config.json").read_text("utf8"))
        assert config.get("attn_implementation") == ("chain" if row["attention"] == "chain" else None)
        model = train.ChainTrackModel.from_pretrained(folder).eval()
        batch = sample_chain_track(train.TASK, 16, generator=torch.Generator().manual_seed(2))
        right = 0
        for sequence in zip(*batch[:4], strict=True):
            with torch.no_grad():
                logits = model(*(field[None] for field in sequence[:3]))["logits"][0]
            right += sum(int(a == b) for a, b in zip(logits.argmax(-1).tolist(), sequence[3].tolist(), strict=True))
        assert row["accuracy"]["T = 30"]["overall"] == pytest.approx(right / (16 * 30))
        assert len(row["losses"]) == row["steps"]
    printed = capsys.readouterr().out
    assert all(table.markdown() in printed for table in chaintrack_tables(run))


def what_a_process_sees(run, folder):
    return {"seed": run.seed, "folder": str(folder), "threads": torch.get_num_threads(), "process": os.getpid()}


@pytest.mark.slow
def test_several_at_a_time_come_back_in_order(tmp_path):
    """Oracle: what each process says of itself."""
    rows = list(results(what_a_process_sees, [Run("chain", 1, 1, seed) for seed in (2, 1)], tmp_path, jobs=2))
    assert [row["seed"] for row in rows] == [2, 1]
    assert all(row["threads"] == 1 and row["folder"] == str(tmp_path) for row in rows)
    assert os.getpid() not in {row["process"] for row in rows}


def lively_model():
    """An untrained model that does not say the same all the time."""
    config = GPT2Config(vocab_size=40, n_positions=96, n_embd=32, n_layer=2, n_head=1, tie_word_embeddings=False)
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id, config.chain_attention = 0, {"gamma": 0.9}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="chain").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def programs_of(count, lines, seed=0):
    return sample_programs(count, lines=lines, chains=2, fresh=0.0, generator=torch.Generator().manual_seed(seed))


def test_answers_from_one_cache_are_those_of_reading_everything_again():
    """Oracle: generation without a cache, and one pass over the whole text, of which each answer is an argmax."""
    model, programs = lively_model(), programs_of(8, 10)
    found = generate.answers(model, programs, told=3)
    assert torch.equal(found, generate.answers(model, programs, told=3, use_cache=False))
    with torch.no_grad():
        at_once = model(programs.ids, use_cache=False).logits.argmax(-1)
    assert torch.equal(found, at_once[:, LINE - 2 :: LINE][:, 3:])
    assert len(found.unique()) > 4


def test_a_batch_of_prompts_gets_the_answers_that_each_gets_alone():
    """Oracle: one prompt at a time, without padding."""
    model, tokenizer = lively_model(), new_tokenizer()
    prompts = ["3 > a ; a > ?", generate.SHOWN, "7 > x ; 1 > y ; y > z ; x > w"]
    together = generate.ask(model, tokenizer, prompts)
    assert together == [generate.ask(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_the_pictures_are_those_of_the_prompt_and_leave_the_model_alone(tmp_path, monkeypatch):
    """Oracle: the matrices that are handed to the plots, against the reference of rows that sum to 1."""
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    model, tokenizer = lively_model(), new_tokenizer()
    drawn, plot = [], generate.plot_mixing

    def watched(matrix, **given):
        drawn.append((matrix, given["tokens"]))
        return plot(matrix, **given)

    monkeypatch.setattr(generate, "plot_mixing", watched)
    before = model(**tokenizer(generate.SHOWN, return_tensors="pt")).logits
    paths = generate.draw(model, tokenizer, generate.SHOWN, tmp_path)
    assert [path.read_bytes()[:8] for path in paths] == [b"\x89PNG\r\n\x1a\n"] * 2
    assert [tokens for _, tokens in drawn] == [generate.SHOWN.split()] * 2
    one_hop, all_hops = (matrix.double() for matrix, _ in drawn)
    one = torch.eye(len(one_hop), dtype=torch.float64)
    expected = 0.1 * one_hop @ torch.linalg.inv(one - 0.9 * one_hop)
    torch.testing.assert_close(all_hops, expected, rtol=0, atol=1e-5)
    assert torch.equal(model(**tokenizer(generate.SHOWN, return_tensors="pt")).logits, before)


def test_the_example_of_generation_runs(monkeypatch, tmp_path, capsys):
    """Oracle: the saved models and tokenizers, loaded here; what is there already is not trained again."""
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    monkeypatch.setattr(generate, "TEST_PROGRAMS", 16)
    arguments = [*SMALL, "--steps", "3", "--deep-steps", "2", "--out", str(tmp_path)]
    generate.main(arguments)
    run = json.loads((tmp_path / "generate.json").read_text("utf8"))
    printed = capsys.readouterr().out
    assert all(table.markdown() in printed for table in program_tables(run))
    assert f"{generate.SHOWN} " in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"mixing.png", "hops.png"}
    for row, name in zip(run["rows"], ("sdpa-2-2-0", "chain-1-3-0"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert model.config._attn_implementation == row["attention"]
        assert AutoTokenizer.from_pretrained(tmp_path / name).decode([3]) == "0"
        programs = programs_of(16, generate.LINES, seed=100)
        with torch.no_grad():
            at_once = model(programs.ids, use_cache=False).logits.argmax(-1)[:, LINE - 2 :: LINE]
        by_depth = accuracy_by_depth(at_once[:, 2:], programs.answers[:, 2:], programs.depth[:, 2:])
        assert row["accuracy"] == pytest.approx(by_depth)
    monkeypatch.setattr(generate, "train", lambda *given: pytest.fail("trained again"))
    generate.main(arguments)
    assert json.loads((tmp_path / "generate.json").read_text("utf8"))["rows"] == run["rows"]
