"""The language model against a cache-free one that drops nothing and masks instead."""

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from hico_kernels import DropPlan, PreLLM, TextTopK, Uniform
from hico_model import llm as llm_module
from hico_model import qwen2
from hico_model.cache import Cache
from hico_model.config import presets
from hico_model.llm import LanguageModel, Prompt
from hico_model.rows import Rows

SMALL = replace(
    presets["nano"],
    hidden_size=48,
    intermediate_size=80,
    num_layers=7,
    num_heads=6,
    num_kv_heads=2,
    vocab_size=101,
    rope_theta=1000.0,
)
PLANS = {
    "none": {},
    "from-the-start": {0: Uniform(0.5)},
    "text-from-the-start": {0: TextTopK(0.5)},
    "uniform-text": {2: Uniform(0.75), 5: TextTopK(0.25)},
    "three-stages": {1: TextTopK(0.5), 3: TextTopK(0.25), 6: TextTopK(0.125)},
    "two-uniform": {1: Uniform(0.6), 4: Uniform(0.3)},
    "text-first": {1: TextTopK(0.6), 4: Uniform(0.2)},
    "counts": {2: Uniform(9), 4: TextTopK(3)},
}
BOTH = pytest.mark.parametrize("positions", ["renumber", "keep"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Everything is small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(config=SMALL, dtype=torch.float64, seed=0):
    """Weights large enough that a wrong position, key or bias shows."""
    model = LanguageModel(config).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def prompts(config=SMALL, dtype=torch.float64):
    """Ragged in everything: text before and after the video, number of visual tokens."""
    draw = torch.Generator().manual_seed(1)
    out = []
    for before, visual, after in [(5, 40, 3), (1, 16, 9), (0, 29, 2), (4, 0, 3)]:
        ids = torch.randint(config.vocab_size, (before + after,), generator=draw).tolist()
        x = torch.randn(visual, config.hidden_size, generator=draw, dtype=torch.float64)
        out.append(Prompt(ids[:before], x.to(dtype) if visual else None, ids[before:]))
    return out


def masked_logits(model, prompt, plan, forced):
    """Logits after the prompt and each id of `forced`; in plain torch, from the state dict."""
    config, weights = model.config, model.state_dict()
    embed = weights["model.embed_tokens.weight"]
    visual = embed[:0] if prompt.visual is None else prompt.visual
    before, after = (
        embed[torch.tensor(ids, dtype=torch.long)] for ids in (prompt.before, prompt.after)
    )
    x = torch.cat([before, visual, after, embed[torch.tensor(forced, dtype=torch.long)]])
    total, n0, start = len(x), len(visual), len(before)
    end = total - len(forced)  # of the prompt
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    alive = torch.ones(total, dtype=torch.bool)
    frequency = config.rope_theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)

    def normed(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def project(x, name):
        y = F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return y.view(len(x), -1, size).transpose(0, 1)

    def turned(x):
        counted = alive.cumsum(0) - 1 if plan.positions == "renumber" else torch.arange(total)
        turn = torch.polar(torch.ones(()).to(x), counted[:, None] * frequency)
        y = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([y.real, y.imag], -1)

    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        a = normed(x, at + "input_layernorm.weight")
        q, k, v = (project(a, f"{at}self_attn.{p}_proj") for p in "qkv")
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if rule := plan.drops.get(i):
            keep = int(n0 * rule.keep) if isinstance(rule.keep, float) else rule.keep
            present = alive[start : start + n0].nonzero()[:, 0] + start
            keep = min(keep, len(present))
            if isinstance(rule, Uniform):
                stay = torch.linspace(0, len(present) - 1, keep, dtype=torch.long)
            else:
                scores = (turned(q)[:, end - 1 : end] @ turned(k)[:, :end].mT)[:, 0] / size**0.5
                scores = scores.masked_fill(~alive[:end], -torch.inf).softmax(-1).mean(0)
                stay = scores[present].argsort(descending=True, stable=True)[:keep]
            alive[start : start + n0] = False
            alive[present[stay]] = True
        logits = turned(q) @ turned(k).mT / size**0.5
        visible = torch.ones(total, total, dtype=torch.bool).tril() & alive
        attention = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ v
        x = x + F.linear(
            attention.transpose(0, 1).flatten(1), weights[at + "self_attn.o_proj.weight"]
        )
        m = normed(x, at + "post_attention_layernorm.weight")
        gate, up = (F.linear(m, weights[f"{at}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, weights[at + "mlp.down_proj.weight"])
    head = embed if config.tie_word_embeddings else weights["lm_head.weight"]
    return F.linear(normed(x[end - 1 :], "model.norm.weight"), head)


def run(model, batch, plan, forced):
    """Logits [B, 1 + steps, V] by prefill and decode; forced [B][steps] are the ids that follow."""
    result = model.prefill(batch, plan, room=len(forced[0]))
    out = [result.logits]
    for tokens in torch.tensor(forced).T:
        out.append(model.decode(tokens, result.cache))
    return torch.stack(out, 1)


def assert_same(got, want):
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


FORCED = [[7, 3, 50, 9], [1, 2, 3, 4], [100, 0, 5, 5], [8, 9, 8, 9]]


@BOTH
@pytest.mark.parametrize("drops", PLANS.values(), ids=PLANS)
def test_dropping_equals_masking_in_a_ragged_batch(drops, positions):
    plan, model, batch = DropPlan(drops, positions), make(), prompts()
    got = run(model, batch, plan, FORCED)
    for row, prompt, forced in zip(got, batch, FORCED, strict=True):
        assert_same(row, masked_logits(model, prompt, plan, forced))


@BOTH
@pytest.mark.parametrize("drops", PLANS.values(), ids=PLANS)
def test_dropping_equals_masking_for_one_prompt(drops, positions):
    plan, model, prompt = DropPlan(drops, positions), make(seed=2), prompts()[0]
    got = run(model, [prompt], plan, FORCED[:1])[0]
    assert_same(got, masked_logits(model, prompt, plan, FORCED[0]))


@BOTH
def test_the_paper_plan_in_28_layers_equals_masking(positions):
    config = replace(SMALL, num_layers=28, tie_word_embeddings=False)
    plan = replace(presets["7b-448"].plan, positions=positions)
    model, batch = make(config), prompts()
    for row, prompt, forced in zip(run(model, batch, plan, FORCED), batch, FORCED, strict=True):
        assert_same(row, masked_logits(model, prompt, plan, forced))


def test_the_plans_give_different_answers():
    model, prompt = make(), prompts()[0]
    plans = [DropPlan(d, p) for d in PLANS.values() for p in ("renumber", "keep")]
    logits = [run(model, [prompt], plan, FORCED[:1])[0, -1] for plan in plans]
    for i, a in enumerate(logits[2:]):  # without drops both ways of counting are one
        for b in logits[2 + i + 1 :]:
            assert (a - b).abs().max() > 1e-3


def test_a_batch_gives_what_its_prompts_give_alone():
    plan, model, batch = DropPlan(PLANS["uniform-text"], "renumber"), make(), prompts()
    together = run(model, batch, plan, FORCED)
    alone = [
        run(model, [prompt], plan, [forced])[0]
        for prompt, forced in zip(batch, FORCED, strict=True)
    ]
    assert_same(together, torch.stack(alone))


def stock(model, dtype=torch.float32):
    """transformers' own Qwen2 with the same weights."""
    c = model.config
    config = Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    peer = Qwen2ForCausalLM(config).to(dtype).eval()
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tie_word_embeddings else set())
    return peer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_without_drops_logits_are_those_of_transformers(tied):
    model = make(replace(SMALL, tie_word_embeddings=tied), torch.float32)
    peer = stock(model)
    for prompt in prompts(dtype=torch.float32):
        embed = model.model.embed_tokens
        parts = [
            embed(torch.tensor(ids, dtype=torch.long)) for ids in (prompt.before, prompt.after)
        ]
        if prompt.visual is not None:
            parts.insert(1, prompt.visual)
        want = peer(inputs_embeds=torch.cat(parts)[None]).logits[:, -1]
        got = model.prefill([prompt], DropPlan({})).logits
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_parameters_have_the_names_of_the_checkpoints():
    with torch.device("meta"):
        large, small = LanguageModel(presets["7b-448"]), LanguageModel(presets["2b-448"])
    names = set(large.state_dict())
    assert len(names) == 28 * 12 + 3
    assert sum(p.numel() for p in large.parameters()) == 7_615_616_512
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < names
    assert {n for n in names if n.startswith("model.layers.27.")} == {
        f"model.layers.27.{n}"
        for n in (
            *(f"self_attn.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")),
            "self_attn.o_proj.weight",
            *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        )
    }
    assert set(small.state_dict()) == names - {"lm_head.weight"}


def test_tied_embeddings_stay_one_tensor_after_leaving_the_meta_device():
    with torch.device("meta"):
        model = LanguageModel(SMALL)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert torch.equal(model.head(torch.eye(48)), model.model.embed_tokens.weight.T)
    assert not list(model.buffers())  # nothing that loading parameters would leave behind


def test_the_golden_drop_of_8192_tokens(monkeypatch):
    """Lengths and positions of [4, 18] / [1, 0.75, 0.25] in the original implementation."""
    monkeypatch.setattr(llm_module, "ragged_attention", lambda q, *a, **k: torch.zeros_like(q))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1}
    config = replace(SMALL, num_layers=28, **small)
    model = make(config, torch.float32)
    result = model.prefill(
        [Prompt([1] * 14, torch.randn(8192, 8), [2] * 36)], presets["7b-448"].plan, room=2
    )
    assert [n for (n,) in result.cache.prompt_lengths] == (
        [50 + 8192] * 4 + [50 + 6144] * 14 + [50 + 2048] * 10
    )
    p = 8192 + 50
    for step in range(2):
        positions = result.cache.advance()[:, 0] - step
        assert positions.tolist() == [p] * 4 + [p - 2048] * 14 + [p - 6144] * 10
    uniform, text = result.kept[4][0], result.kept[18][0]
    assert uniform.sum() == 25159681
    assert len(text) == 2048
    assert torch.isin(text, uniform).all()
    assert (text.diff() > 0).all()


def test_positions_of_kept_tokens_stay_when_the_plan_keeps_them():
    model = make()
    plan = DropPlan(PLANS["uniform-text"], "keep")
    result = model.prefill(prompts()[:2], plan, room=2)
    assert result.cache.prompt_lengths[-1] == (8 + 10, 10 + 4)
    for step in range(2):
        assert result.cache.advance().tolist() == [[48 + step, 26 + step]] * 7


def test_kept_and_scores_tell_what_the_text_chose():
    model, batch = make(), prompts()
    result = model.prefill(batch, DropPlan(PLANS["uniform-text"]))
    assert list(result.kept) == [2, 5]
    assert list(result.scores) == [5]
    for b, n in enumerate([40, 16, 29, 0]):
        first, scores = result.kept[2][b], result.scores[5][b]
        assert torch.equal(first, torch.linspace(0, n - 1, int(n * 0.75), dtype=torch.long))
        assert scores.shape == first.shape
        best = scores.topk(int(n * 0.25)).indices.sort().values
        assert torch.equal(result.kept[5][b], first[best])
        assert n == 0 or 0 < scores.sum() < 1


def snapshot(model):
    return {
        name: {k: v for k, v in vars(m).items() if not isinstance(v, dict | MappingProxyType)}
        for name, m in model.named_modules()
    }


def test_calls_in_turns_do_not_disturb_each_other():
    plan, model, batch = DropPlan(PLANS["uniform-text"], "renumber"), make(), prompts()
    before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    want = [run(model, [p], plan, [f])[0] for p, f in zip(batch[:2], FORCED, strict=False)]
    calls = [model.prefill([p], plan, room=4) for p in batch[:2]]
    got = [[c.logits[0]] for c in calls]
    for step in range(4):
        for i in (1, 0):
            got[i].append(model.decode(torch.tensor([FORCED[i][step]]), calls[i].cache)[0])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(torch.stack(a), b)
    assert snapshot(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


class Rowcount(TorchDispatchMode):
    """The most rows that any result with as many columns as the vocabulary had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        computes = func not in (torch.ops.aten.t.default, torch.ops.aten.detach.default)
        if computes and isinstance(out, torch.Tensor) and out.shape[-1:] == (SMALL.vocab_size,):
            self.rows = max(self.rows, out.numel() // SMALL.vocab_size)
        return out


def test_logits_are_made_for_the_last_rows_only():
    model, batch = make(), prompts()
    with Rowcount() as seen:
        model.prefill(batch, DropPlan({}))
    assert seen.rows == len(batch)


def test_scoring_asks_for_the_query_of_the_last_rows_only():
    model, batch = make(), prompts()
    rows = []
    project = model.model.layers[5].self_attn.q_proj
    hook = project.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    result = model.prefill(batch, DropPlan(PLANS["uniform-text"]))
    hook.remove()
    assert rows == [len(batch), sum(result.cache.prompt_lengths[5])]


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: whoever asks for one raises."""
    with torch.device("meta"):
        model = LanguageModel(SMALL)
    batch = [
        Prompt([1, 2], torch.empty(40, 48, device="meta"), [3]),
        Prompt([4], torch.empty(9, 48, device="meta"), [5, 6]),
    ]
    for positions in ("keep", "renumber"):
        result = model.prefill(batch, DropPlan(PLANS["uniform-text"], positions), room=1)
        assert result.logits.shape == (2, 101)
        logits = model.decode(torch.zeros(2, dtype=torch.long, device="meta"), result.cache)
        assert logits.is_meta


def test_text_alone_is_a_prompt():
    model = make(dtype=torch.float32)
    ids = [5, 6, 7, 8]
    got = model.prefill([Prompt([], None, ids)], DropPlan({2: TextTopK(0.5)}))
    with torch.no_grad():
        want = stock(model)(input_ids=torch.tensor([ids])).logits[:, -1]
    assert (got.logits - want).abs().max() <= 1e-4 * want.abs().max()
    assert got.cache.prompt_lengths == [(4,)] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotary_angles_are_exact_far_beyond_the_trained_positions(dtype):
    """In the original bfloat16 model they are wrong by up to 2 past position 32768."""
    config = presets["7b-448"]
    positions = torch.tensor([0, 255, 32767, 32769, 50001])
    cos, sin = qwen2.rope(positions, config, dtype)
    angles = positions[:, None].double() * 1e6 ** (-torch.arange(0, 128, 2).double() / 128)
    assert cos.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 0.01)  # float32 angles end at 0.004 there
    assert (cos[:, 0].double() - angles.cos()).abs().max() < tolerance
    assert (sin[:, 0].double() - angles.sin()).abs().max() < tolerance


def test_a_half_precision_model_is_as_near_as_half_precision_allows():
    exact = make(dtype=torch.float64)
    plan, batch = DropPlan({2: Uniform(0.5)}, "renumber"), prompts()
    want = run(exact, batch, plan, FORCED)
    half = make(dtype=torch.float64).to(torch.bfloat16)
    half_batch = [
        p._replace(visual=None if p.visual is None else p.visual.bfloat16()) for p in batch
    ]
    got = run(half, half_batch, plan, FORCED)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 0.1 * want.abs().max()


def test_the_cache_has_its_full_size_at_once_and_says_it():
    model = make(dtype=torch.float32)
    result = model.prefill(prompts(dtype=torch.float32)[:2], DropPlan({5: Uniform(0.25)}), room=3)
    cache = result.cache
    long, short = 48 + 3, 18 + 3  # the longer sequence of the two, and room
    assert [k.shape[1] for k in cache.keys] == [long] * 5 + [short] * 2
    assert cache.bytes == 2 * 4 * 2 * 2 * 8 * (5 * long + 2 * short)
    places = [x.data_ptr() for x in (*cache.keys, *cache.values)]
    for _ in range(3):
        model.decode(torch.tensor([1, 2]), cache)
    assert [x.data_ptr() for x in (*cache.keys, *cache.values)] == places
    assert cache.lengths.tolist() == [[51, 29]] * 5 + [[21, 17]] * 2
    with pytest.raises(ValueError, match="the cache is full"):
        model.decode(torch.tensor([1, 2]), cache)


def test_a_cache_holds_nothing_of_the_neighbour():
    rows = Rows((2, 3), (0, 0), (0, 0))
    cache = Cache([rows], rows, room=1, renumber=True, device=torch.device("cpu"))
    k = torch.arange(5.0).view(5, 1, 1)
    cache.put(k, -k)
    assert cache.keys[0][0, :2].flatten().tolist() == [0, 1]
    assert cache.values[0][1, :3].flatten().tolist() == [-2, -3, -4]


def test_errors_name_the_argument():
    model = make(dtype=torch.float32)
    visual = torch.zeros(8, 48)
    with pytest.raises(ValueError, match="layer 7 is out of range, the model has layers 0 to 6"):
        model.prefill([Prompt([], visual, [1])], DropPlan({7: Uniform(0.5)}))
    with pytest.raises(ValueError, match=r"pre_llm must be None, .* got PreLLM\(merge_to=4"):
        model.prefill([Prompt([], visual, [1])], DropPlan({}, pre_llm=PreLLM(4)))
    with pytest.raises(ValueError, match=r"keep as a ratio must be in \(0, 1\], got 1.5"):
        Uniform(1.5)
    with pytest.raises(ValueError, match="prompt 1 must end in text"):
        model.prefill([Prompt([], visual, [1]), Prompt([1], visual, [])], DropPlan({}))
    with pytest.raises(
        ValueError, match=r"visual tokens of prompt 0 must be \[M, 48\], got \(8, 47\)"
    ):
        model.prefill([Prompt([], visual[:, 1:], [1])], DropPlan({}))
    with pytest.raises(ValueError, match="at least one prompt"):
        model.prefill([], DropPlan({}))
