"""The benchmark's arithmetic; times themselves are never asserted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import transmla
from tests.families import lively_config, lively_model, lively_source
from transmla.checkpoint.resolve import resolve
from transmla.cli import main
from transmla.errors import GeometryError
from transmla.evaluation import budget, roofline, speed, steps
from transmla.evaluation.cache import held_bytes
from transmla.model.loading import load_any

STORIES = resolve("stories260k").path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "mla"
    transmla.convert("smoke", folder, refine="off")
    return folder


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("PRODUCT", "GPU_PRODUCT"):
        monkeypatch.setattr(roofline, size, 64)
    for size in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(roofline, size, 4096)


def test_caches_of_its_own(converted: Path) -> None:
    kinds = ["latent", "latent-int4"]
    report = transmla.bench(converted, contexts=(200,), steps=3, repeats=1, caches=kinds, dtype="float32")
    assert [row.model for row in report.rows] == [str(converted), *(f"{converted}, {kind}" for kind in kinds)]
    as_usual, exact, packed = (row.cache_bytes_per_token for row in report.rows)
    # of 200 tokens the newest 72 are exact; of the first 4 there are exact and packed values
    assert as_usual == 640 and exact == pytest.approx(640, rel=1e-3)
    assert packed == pytest.approx((128 * 5 * (12 + 8 + 8) + (72 + 4) * 640) / 200, rel=1e-3)
    words = [
        "bench",
        str(converted),
        "--context",
        "16",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--cache",
        "latent-int5",
        "-q",
    ]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 4 and "no latent cache of kind" in refused.output


@pytest.fixture(scope="module")
def prepared(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed") / "coded"
    transmla.quantise(converted, folder, tokens=4096)
    return folder


def test_as_many_texts_as_fit(prepared: Path) -> None:
    """By bytes of the formats, and by those of a cache that really holds as many texts, or one more."""
    budget, context, steps = 1_000_000, 200, 8
    given: dict[str, Any] = {"contexts": (context,), "steps": steps, "repeats": 1, "dtype": "float32"}
    report = transmla.bench(prepared, "stories260k", cache_budget=budget, **given)
    assert report.rows == () and report.budget is not None and report.budget.bytes == budget
    rows = {row.cache if row.model == "stories260k" else f"our {row.cache}": row for row in report.budget.rows}
    assert list(rows) == [
        "float32", "KIVI 4 bits", "rotated 4 bits", "our float32", "our latent-int8", "our latent-int4",
        "our latent-coded3",
    ]  # fmt: skip
    # 5 layers; of 200 tokens the newest 72 are exact and there is room for all in packed form
    assert rows["float32"].bytes_per_text == context * 5 * 64 * 4
    assert rows["our float32"].bytes_per_text == context * 5 * 32 * 4 + 5 * 8
    for bits in (4, 8):
        packed = context * (24 * bits // 8 + 8 + 2 * 4)
        assert rows[f"our latent-int{bits}"].bytes_per_text == 5 * (packed + (72 + 4) * 32 * 4 + 8)
    # of 32 values per token and layer, exact but for the first 4 and 64 to 127 others
    assert rows["rotated 4 bits"].bytes_per_text == 5 * ((4 + 127) * 256 + 64 * 8 * (4 + 2))
    model = load_any(prepared, dtype=torch.float32)
    ids = torch.zeros(1, context, dtype=torch.long)
    for name, row in rows.items():
        assert row.context == context and row.tokens == row.texts * context
        assert row.texts == budget // row.bytes_per_text > 0
        if "4 bits" in name:
            assert row.tokens_per_second is None and "counted" in str(row.remark)
            continue
        assert row.remark is None and 0 < row.slowest <= row.tokens_per_second <= row.fastest
        assert (row.speed_ratio == 1) == (name == "float32")
        if name.startswith("our"):
            kind = name.removeprefix("our latent-").replace("our float32", "exact")
            most = 0
            cache = model.latent_cache(kind, max_length=context)
            with torch.no_grad():
                model(ids[:, :-steps].repeat(row.texts + 1, 1), past_key_values=cache)
                for _ in range(steps):
                    model(ids[:, :1].repeat(row.texts + 1, 1), past_key_values=cache)
                    most = max(most, held_bytes(cache))
            assert most > budget >= most * row.texts / (row.texts + 1)
    assert rows["our latent-int4"].texts > rows["our float32"].texts > rows["float32"].texts
    json.dumps(report.plain(), allow_nan=False)


def test_a_step_has_its_share_of_packing(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which falls between the steps that are timed: as many tokens are packed at once as stay exact."""
    model = load_any(converted, dtype=torch.float32)
    now, packed = [0.0], []
    for kind in ("int4", "exact"):
        cache = model.latent_cache(kind)
        for code in {layer.code for layer in cache.layers} - {None}:

            def encode(x_BNk: torch.Tensor, encode: Any = code.encode) -> Any:
                packed.append(x_BNk.shape[1])
                now[0] += 3.0 * x_BNk.shape[1]
                return encode(x_BNk)

            monkeypatch.setattr(code, "encode", encode)
        steps.fill(model, torch.zeros(2, 150, dtype=torch.long), lambda cache=cache: cache)
        packed.clear()
        with monkeypatch.context() as clock:
            clock.setattr("time.perf_counter", lambda: now[0])
            found = steps.packing(cache, 16, torch.device("cpu"), repeats=2)
            assert steps.packing(cache, 128, torch.device("cpu")) == 0
        # three seconds for each token in each of five layers
        assert (found, packed) == ((15.0, [64] * 10) if kind == "int4" else (0.0, []))
    monkeypatch.setattr(speed, "decode", lambda *_: 8.0)
    monkeypatch.setattr(speed, "rewind", lambda *_: None)
    monkeypatch.setattr(speed, "packing", lambda cache, *_: 2.0 * hasattr(cache.layers[0], "code"))
    made: dict[str, Any] = {"contexts": (16,), "repeats": 1, "dtype": "float32"}
    report = transmla.bench(converted, steps=4, caches=["latent-int4"], **made)
    assert [row.tokens_per_second for row in report.rows] == [1 / 2.0, 1 / 4.0]


def test_speeds_within_a_budget_are_those_of_the_same_turns() -> None:
    """Of all texts together, medians behind a turn that warms up, and beside the source in the turns of this cache."""

    def turn(texts: int, *times: float) -> Any:
        made: Any = object.__new__(budget._Turn)
        made.kind, made.texts, made.context = budget.Kind("model", "cache", None, lambda length: None), texts, 10
        made.seconds, made.paired, made.bytes_per_text, made.remark, made.cache = [], [], 5, None, object()
        left = iter(times)
        made.step = lambda device: next(left)
        return made

    base = turn(2, 900.0, 2.0, 8.0, 4.0, 900.0, 1.0, 1.0, 1.0)
    one, other = turn(6, 700.0, 3.0, 2.0, 6.0), turn(4, 700.0, 1.0, 1.0, 1.0)
    for made in (one, other):
        budget._take_turns(base, made, 3, torch.device("cpu"))
    row = one.row(base)
    assert (row.texts, row.tokens, row.bytes_per_text) == (6, 60, 5)
    assert (row.slowest, row.tokens_per_second, row.fastest) == (1.0, 2.0, 3.0)
    assert row.speed_ratio == 2.0 / 0.5 and other.row(base).speed_ratio == 4.0 / 2.0
    assert (base.row(base).tokens_per_second, base.row(base).speed_ratio) == (1.5, 1.0)


class Queue:
    """A device on which calls return at once, and what they gave it takes a second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.queued = 0.0, 0.0
        for module in (steps, roofline, speed):
            monkeypatch.setattr(module, "wait", self.wait)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def wait(self, device: torch.device) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def give(self, *_: Any, **__: Any) -> None:
        self.queued += 1.0


def test_times_are_those_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of what was asked for alone, not of what was given to it before."""
    queue, device = Queue(monkeypatch), torch.device("cuda")
    queue.queued = 50.0
    cache: Any = None
    assert steps.decode(queue.give, cache, torch.zeros(2, 3), device) == 3.0
    queue.queued = 50.0
    assert roofline.seconds(queue.give, device) == 1.0


def test_the_first_token_is_there_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, model = Queue(monkeypatch), AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    model.register_forward_hook(queue.give)
    rows = speed._measured({"m": model}, {"m": None}, 1, 8, 2, 1, torch.device("cpu"), roofline.Rates(1.0, 1.0))
    assert rows[0].first_token_seconds == 1.0 and rows[0].tokens_per_second == 1.0


def test_a_budget_that_no_text_fits_into(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "budget.json"
    words = ["bench", str(converted), "--against", "stories260k", "--steps", "2", "--repeats", "1", "-q"]
    words += ["--context", "16,64", "--dtype", "float32", "--cache", "latent-int8"]
    done = CliRunner().invoke(main, [*words, "--cache-budget", "45KiB", "--json", str(out)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "one text takes 80.0 KiB" in done.stdout and "fit into 45.0 KiB" in done.stdout
    content = json.loads(out.read_text())["budget"]
    assert content["bytes"] == 45 * 1024
    assert [(row["cache"], row["texts"]) for row in content["rows"] if row["context"] == 64] == [
        ("float32", 0), ("KIVI 4 bits", 0), ("rotated 4 bits", 0), ("latent-int8", 1)
    ]  # fmt: skip
    assert [row["speed_ratio"] for row in content["rows"] if row["context"] == 64] == [None] * 4
    assert content["rows"][-1]["tokens_per_second"] > 0
    assert CliRunner().invoke(main, [*words, "--cache-budget", "2 parsecs"]).exit_code == 2
    too_short = CliRunner().invoke(main, [*words, "--context", "2", "--cache-budget", "1MB"])
    assert too_short.exit_code == 6 and "are decoded" in too_short.output


def test_rows_of_the_grid(converted: Path) -> None:
    report = transmla.bench(
        converted, "stories260k", contexts=(16, 40, 9000), batches=(1, 3), steps=3, repeats=2, stock=True,
        dtype="float32",
    )  # fmt: skip
    models = ["stories260k", str(converted), f"{converted}, stock class"]
    grid = [(batch, context) for batch in (1, 3) for context in (16, 40)]
    assert [(row.batch, row.context, row.model) for row in report.rows] == [(*at, one) for at in grid for one in models]
    assert report.notes == ("context 9,000 left out: the models end at 512",)
    # 5 layers of 64 and of 24 + 8 values
    sizes = {row.model: row.cache_bytes_per_token for row in report.rows}
    assert list(sizes.values()) == [1280, 640, 640]
    for row in report.rows:
        assert 0 < row.slowest <= row.tokens_per_second <= row.fastest
        assert row.of_floor == pytest.approx(row.batch / row.tokens_per_second / row.floor_seconds)
        assert row.prefill_tokens_per_second == pytest.approx(row.batch * row.context / row.first_token_seconds)
        assert (row.speed_ratio == 1) == (row.model == "stories260k")
    json.dumps(report.plain(), allow_nan=False)


def test_layers_with_a_window_hold_no_more_than_it(tmp_path: Path) -> None:
    """Each timing starts from the same cache, although what has left a window does not come back."""
    folder = lively_source(tmp_path / "source", model_type="gemma2")
    model = load_any(folder, dtype=torch.float32)
    config, context = model.config, 40
    window, kinds = config.sliding_window, config.layer_types
    assert window < context and len(set(kinds)) == 2
    report = transmla.bench(folder, contexts=(context,), steps=3, repeats=2, dtype="float32")
    held = [window - 1 if kind == "sliding_attention" else context for kind in kinds]
    values = 2 * config.num_key_value_heads * config.head_dim * 4
    assert report.rows[0].cache_bytes_per_token == pytest.approx(values * sum(held) / context)
    longer = roofline.step_cost(model, 1, context + 1, 0.0)[0] - roofline.step_cost(model, 1, context, 0.0)[0]
    assert longer == kinds.count("full_attention") * config.num_attention_heads * 2 * config.head_dim

    ids_1S = torch.arange(context + 3)[None] % 7
    cache = steps.fill(model, ids_1S[:, :context])
    windows = steps.forgetful(cache)
    with torch.inference_mode():
        expected_3V = model(ids_1S).logits[0, context:]
        for _ in range(2):
            parts = [model(one, past_key_values=cache).logits[0] for one in ids_1S[:, context:].split(1, 1)]
            torch.testing.assert_close(torch.cat(parts), expected_3V)
            steps.rewind(cache, 3, windows)
    budget = transmla.bench(
        folder, contexts=(context,), steps=3, repeats=1, dtype="float32", cache_budget=8 * values * sum(held)
    ).budget
    assert budget is not None and budget.rows[0].texts > 4 and budget.rows[0].tokens_per_second


# what limits a step: multiply-adds and bytes per second of the machine
@pytest.mark.parametrize("rates", [roofline.Rates(1e6, 1e12), roofline.Rates(1e12, 1e6)], ids=["products", "memory"])
def test_times_stand_beside_their_floor(
    converted: Path, monkeypatch: pytest.MonkeyPatch, rates: roofline.Rates
) -> None:
    """Of a machine with known rates and steps that take known times: the first is not counted, the median is shown."""
    times = {"LlamaForCausalLM": [900.0, 2.0, 8.0, 4.0], "DeepseekV3ForCausalLM": [900.0, 1.0, 7.0, 1.6]}
    left = {name: list(values) for name, values in times.items()}

    def decode(model: Any, cache: Any, ids: torch.Tensor, device: torch.device) -> float:
        for _ in range(ids.shape[1]):
            model(ids[:, :1], past_key_values=cache)
        return left[type(model).__name__].pop(0)

    monkeypatch.setattr(speed, "machine_rates", lambda *_: rates)
    monkeypatch.setattr(speed, "decode", decode)
    given: dict[str, Any] = {"contexts": (16,), "batches": (3,), "steps": 2, "repeats": 3, "dtype": "float32"}
    report = transmla.bench(converted, "stories260k", **given)
    for row, values, (model, cached) in zip(
        report.rows, ([2.0, 8.0, 4.0], [1.0, 7.0, 1.6]), (("stories260k", 1280), (str(converted), 640)), strict=True
    ):
        assert row.model == model and row.cache_bytes_per_token == cached
        multiply_adds, moved = roofline.step_cost(load_any(model, dtype=torch.float32), 3, 16, 3 * 16 * cached)
        floor = multiply_adds / 1e6 if rates.bytes == 1e12 else moved / 1e6
        median = sorted(values)[1] / 2
        assert row.floor_seconds == pytest.approx(floor) and row.of_floor == pytest.approx(median / floor)
        assert [row.slowest, row.tokens_per_second, row.fastest] == pytest.approx(
            [3 / (max(values) / 2), 3 / median, 3 / (min(values) / 2)]
        )
    assert [row.speed_ratio for row in report.rows] == [1, pytest.approx(4.0 / 1.6)]


def test_the_machine_s_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fastest product and copy; a copy reads and writes."""
    seconds = iter([9.0, 4.0, 5.0, 6.0, 7.0, 3.0, 2.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr(roofline, "seconds", lambda call, device: call() is None or next(seconds))
    found = roofline.machine_rates(torch.device("cpu"), torch.float32)
    assert found == roofline.Rates(64**3 / 4.0, 2 * 4096 * 4 / 2.0)


def test_products_that_are_emulated_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides are doubled from 256 until a product takes long enough to be timed, or is as large as they get."""
    monkeypatch.setattr(roofline, "PRODUCT", 1024)
    for taken, side in ((0.5, 256), (1e-3, 1024)):
        monkeypatch.setattr(roofline, "seconds", lambda call, device, taken=taken: taken)
        assert roofline.product_rate(torch.device("cpu"), torch.float32) == side**3 / taken


def test_cost_of_a_step_counts_every_product() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    seen = 0

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal seen
        seen += module.weight.numel() * args[0].shape[0] * args[0].shape[1]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(2, 1, dtype=torch.long))
    config = model.config
    attention = config.num_hidden_layers * config.num_attention_heads * 2 * config.head_dim
    norms = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    multiply_adds, moved = roofline.step_cost(model, 2, 7, 1000.0)
    assert multiply_adds == seen + 2 * (norms + 7 * attention)
    assert moved == 1000 + 4 * sum(weight.numel() for weight in model.parameters())


def test_cost_of_a_step_by_what_it_attends_to() -> None:
    """Latents are read twice, rotary keys once; layers with a window read no more than it."""
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 12}
    window = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    for given, each, attended in (
        ({}, 2 * 3, 3 * 10),
        ({"head_dim": 5}, 2 * 5, 3 * 10),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, 2 * 24 + 8, 3 * 10),
        (window, 2 * 3, 6 + 10 + 6),
        ({"sliding_window": 6}, 2 * 3, 3 * 6),
        (window | {"sliding_window": 60}, 2 * 3, 3 * 10),
    ):
        model: Any = torch.nn.Embedding(7, 12)
        model.config = SimpleNamespace(**sizes | given)
        model.config.get_text_config = lambda decoder, config=model.config: config
        model.get_input_embeddings = lambda model=model: model
        model.get_output_embeddings = lambda: SimpleNamespace(weight=None)
        assert roofline.step_cost(model, 2, 10, 9.0) == (2 * 4 * each * attended, 9.0)


def without_memory(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, least: int = 1) -> None:
    """A function of a module runs out of memory with the source, from so many texts on."""
    real = getattr(module, name)

    def failing(model: Any, first: Any, *rest: Any) -> Any:
        if type(model).__name__.startswith("Llama") and (least == 1 or len(first) >= least):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, first, *rest)

    monkeypatch.setattr(module, name, failing)


def test_a_size_that_does_not_fit_is_a_row(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_memory(monkeypatch, speed, "fill", least=2)
    report = transmla.bench(converted, "stories260k", contexts=(8,), batches=(1, 2), steps=2, repeats=1)
    assert [row.failed for row in report.rows] == [None, None, "out of memory", None]
    assert report.rows[3].speed_ratio is None and report.rows[3].tokens_per_second


def test_experts_count_by_what_a_token_sees() -> None:
    model = lively_model(lively_config(model_type="mixtral", layers=1))
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    assert len(experts) == 2 and all(len(weight) == 4 for weight in experts), "two of four are chosen"
    others = sum(weight.numel() for weight in model.parameters()) - sum(map(torch.numel, experts))
    others -= model.get_input_embeddings().weight.numel()
    multiply_adds, moved = roofline.step_cost(model, 1, 0, 0.0)
    assert multiply_adds == others + sum(map(torch.numel, experts)) / 2
    assert moved == 4 * multiply_adds
    assert roofline.step_cost(model, 3, 0, 0.0)[1] == 4 * (others + sum(map(torch.numel, experts)))


def test_a_step_that_does_not_fit_is_a_row(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_memory(monkeypatch, speed, "decode")
    report = transmla.bench(converted, "stories260k", contexts=(8,), steps=2, repeats=1)
    assert [row.failed for row in report.rows] == ["out of memory", None]
    assert report.rows[1].speed_ratio is None and report.rows[1].tokens_per_second


def test_a_budget_beyond_the_memory_is_a_row(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_memory(monkeypatch, budget, "fill")
    report = transmla.bench(converted, "stories260k", contexts=(16,), steps=2, repeats=1, cache_budget=2**20)
    assert report.budget is not None
    assert [(row.texts > 0, row.remark) for row in report.budget.rows][:1] == [
        (False, "out of memory: one text beside the weights")
    ]
    assert report.budget.rows[-1].tokens_per_second


def test_other_errors_are_not_swallowed(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(speed, "decode", failing)
    with pytest.raises(RuntimeError, match="shapes differ"):
        transmla.bench(converted, contexts=(8,), steps=2, repeats=1)


def test_command_line(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", str(converted), "--against", "stories260k", "--steps", "2", "--repeats", "1", "-q"]
    done = CliRunner().invoke(main, [*words, "--context", "8", "--batch", "1,2", "--json", str(out)])
    assert done.exit_code == 0 and "x floor" in done.stdout and "threads" in done.stdout
    assert len(json.loads(out.read_text())["rows"]) == 4
    assert CliRunner().invoke(main, [*words, "--context", "8,0"]).exit_code == 2
    with pytest.raises(GeometryError, match="no context fits"):
        transmla.bench(converted, contexts=(4096,))
    for many in (512, 600):
        with pytest.raises(GeometryError, match="steps do not fit"):
            transmla.bench(converted, contexts=(64,), steps=many)
