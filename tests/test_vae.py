"""vae.py and latent.py against torch.distributions, quadrature, GPT itself, and toy corpora."""

import math

import pytest
import torch
from test_data import Numbers, make_shard, write_shard
from torch.distributions import Independent, Normal, kl_divergence

from nanokl import UserError, latent
from nanokl.data import Shard, document_batch, document_eval_batches
from nanokl.generate import generate
from nanokl.latent import Latents, normal_log_prob, sampled_log_weights, text_nll
from nanokl.logprob import linear_logprob
from nanokl.optim import make_optimizers
from nanokl.runtime import generator
from nanokl.tokenizer import train_bpe
from nanokl.transformer import Transformer
from nanokl.vae import VAE, Given, VAEConfig, gaussian_kl, negative_elbo, reparametrise

SIZES = {"vocab_size": 29, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
BOTH = pytest.mark.parametrize("arch", ["transformer", "lstm"])


def make(arch="transformer", seed=0, loud=True, **fields) -> VAE:
    """A random model in which, unless not `loud`, everything depends on everything."""
    vae = VAE(VAEConfig(arch=arch, **SIZES | {"n_latent": 3} | fields), generator(seed, "vae"))
    if loud:
        with torch.no_grad():
            for p in vae.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator(seed, "loud", p.numel())))
    return vae.eval()


def texts(n=4, T=9, seed=0):
    """idx, mask (n, T): separators 28 at both ends, lengths from T down."""
    rng = generator(seed, "texts")
    idx, length = torch.randint(0, 28, (n, T), generator=rng), torch.arange(T, T - n, -1)
    mask = torch.arange(T) < length[:, None]
    idx[:, 0] = idx[torch.arange(n), length - 1] = 28
    return idx.where(mask, 28), mask


def normal(n, Z=3, seed=0):
    return torch.randn(n, Z, generator=generator(seed, "normal"))


# ------------------------------------------------------------------------------------- formulas
def test_gaussians_are_torchs():
    mu, logvar, z = (normal(5, 4, seed) for seed in range(3))
    q = Normal(mu.double(), (0.5 * logvar).exp().double())
    p = Normal(torch.zeros(4).double(), torch.ones(4).double())
    torch.testing.assert_close(gaussian_kl(mu, logvar).double(), kl_divergence(q, p))
    for args, law in (((mu, logvar), q), ((), p)):
        expected = Independent(law, 1).log_prob(z.double())
        torch.testing.assert_close(normal_log_prob(z, *args).double(), expected)


def test_reparametrised_samples_have_mean_and_spread():
    """20,000 draws; each of six numbers is off by 5 standard errors with odds below 4e-6."""
    mu, logvar = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[0.0, 1.0, -2.0]])
    z = reparametrise(mu, logvar, normal(20_000))
    sd = (0.5 * logvar[0]).exp()
    assert ((z.mean(0) - mu[0]).abs() < 5 * sd / 20_000**0.5).all()
    assert ((z.std(0) - sd).abs() < 5 * sd / 40_000**0.5).all()


def test_negative_elbo_by_hand():
    nll, kl = torch.tensor([10.0, 20.0]), torch.tensor([[0.1, 2.0], [0.3, 1.0]])
    cases = (({}, 15 + 0.2 + 1.5), ({"weight": 0.5}, 15 + 0.85), ({"free_bits": 0.25}, 15 + 1.75),
             ({"free_bits": 3.0, "weight": 0.5}, 15 + 3.0))
    for options, expected in cases:
        kl.requires_grad_()
        loss, info = negative_elbo(nll, kl, **options)
        assert loss.item() == pytest.approx(expected), options
        assert info["kl"].item() == pytest.approx(1.7) and info["nll"].item() == 15
        (grad,) = torch.autograd.grad(loss, kl)
        free = torch.tensor([[0.2, 1.5]]) <= options.get("free_bits", 0.0)
        expected = torch.where(free, 0.0, options.get("weight", 1.0) / 2).expand(2, 2)
        torch.testing.assert_close(grad, expected)


def test_two_halves_of_a_batch_are_the_batch():
    """What is free is a matter of the whole batch: gradients of halves average to its own."""
    nll, kl = normal(6, 1)[:, 0], normal(6).square()
    whole = kl.clone().requires_grad_()
    negative_elbo(nll, whole, free_bits=1.0)[0].backward()
    mean = kl.mean(0)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        part = kl[half].clone().requires_grad_()
        negative_elbo(nll[half], part, free_bits=1.0, mean=lambda x: mean)[0].backward()
        torch.testing.assert_close(part.grad / 2, whole.grad[half])


# --------------------------------------------------------------------------------------- models
def test_without_z_it_is_a_gpt():
    vae, (idx, mask) = make(), texts()
    plain = make(n_latent=0, seed=1)
    weights = {name: x for name, x in vae.decoder.state_dict().items()
               if not name.startswith(("everywhere", "first"))}
    plain.decoder.load_state_dict(weights)
    assert torch.equal(vae.decoder(idx, torch.zeros(4, 3)), plain.decoder(idx, torch.zeros(4, 0)))
    expected = Transformer.forward(plain.decoder, idx)
    h, mu, logvar = plain(idx, mask, idx, torch.zeros(4, 0))
    torch.testing.assert_close(h, expected[:, :-1])
    assert mu.shape == logvar.shape == (4, 0) and not hasattr(plain, "encoder")


@BOTH
def test_the_decoder_sees_the_past_and_z_alone(arch):
    vae, (idx, mask) = make(arch), texts()
    h, mu, _ = vae(idx, mask, idx, normal(4))
    assert h.shape == (4, 8, 16) and mu.shape == (4, 3)
    z = normal(4).requires_grad_()
    h = vae.decoder(idx[:, :-1], z)
    for t in (0, 7):  # z from the first position on
        (grad,) = torch.autograd.grad(h[:, t].square().sum(), z, retain_graph=True)
        assert (grad.abs().sum(1) > 0).all()
    for p in vae.encoder.parameters():  # given z, the encoder has no say
        if p is not vae.decoder.wte.weight:
            p.data.mul_(3.0)
    assert torch.equal(vae.decoder(idx[:, :-1], z), h)
    later = idx.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 28
    again = vae.decoder(later[:, :-1], z)
    torch.testing.assert_close(again[:, :5], h[:, :5])
    assert (again[:, 5:] - h[:, 5:]).abs().amax(2).gt(1e-4).all()


@BOTH
def test_padding_and_company_do_not_matter(arch):
    vae, (idx, mask) = make(arch), texts()
    mu, logvar = vae.encode(idx, mask)
    for i in range(4):
        n = int(mask[i].sum())
        alone = vae.encode(idx[i : i + 1, :n], mask[i : i + 1, :n])
        torch.testing.assert_close(alone[0][0], mu[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone[1][0], logvar[i], atol=1e-5, rtol=1e-5)
    nll = text_nll(vae, idx, mask, mu)
    i, n = 3, int(mask[3].sum())
    alone = text_nll(vae, idx[i:, :n], mask[i:, :n], mu[i:])
    torch.testing.assert_close(alone[0], nll[i], atol=1e-4, rtol=1e-5)


@BOTH
def test_sampling_with_a_cache_is_the_whole_law(arch):
    """Rows that stop leave the batch, and the others keep their own z."""
    vae, z = make(arch), 2 * normal(24)
    prompts = [[28]] * 12 + [[28, 3, 5]] * 12
    rollout = generate(Given(vae, z), prompts, 8, stop=1, rng=generator(1))
    assert rollout.stopped.any() and not rollout.stopped.all()
    h = vae.decoder(rollout.idx[:, :-1], z)
    expected = linear_logprob(h, vae.head.weight, rollout.idx[:, 1:], mask=rollout.mask).logp
    torch.testing.assert_close(rollout.logp, expected, atol=2e-5, rtol=1e-4)


@BOTH
def test_checkpoint_round_trip(arch, tmp_path):
    vae, (idx, mask) = make(arch), texts()
    vae.save_pretrained(tmp_path / "x")
    again = VAE.from_pretrained(tmp_path / "x").eval()
    for a, b in zip(vae(idx, mask, idx, normal(4)), again(idx, mask, idx, normal(4)), strict=True):
        assert torch.equal(a, b)
    assert again.encoder.wte is again.decoder.wte


def test_bad_configs():
    for fields in ({"arch": "gru"}, {"n_latent": -1}, {"encoder_layers": 0}, {"n_latent": 1.5}):
        with pytest.raises(UserError, match=next(iter(fields))):
            make(**fields)


# --------------------------------------------------------------------------------- rows of texts
def test_document_rows_are_documents(tmp_path):
    shard, tokenizer, docs = make_shard(tmp_path, [5, 1, 7, 12, 3, 4])
    separator, seen = tokenizer.special("<|endoftext|>"), []
    for idx, mask in document_eval_batches(shard, block_size=9, batch_size=4):
        for row, real in zip(idx, mask, strict=True):
            inner = row[real].tolist()
            assert inner[0] == inner[-1] == separator and (row[~real] == separator).all()
            seen += inner[1:-1]
    assert sorted(seen) == list(range(32))  # each token once
    steps = [document_batch(shard, i, batch_size=4, block_size=9, seed=0) for i in range(40)]
    first_tokens = {int(doc[0]) for doc in docs}
    for idx, mask in steps:
        assert idx.shape[1] <= 9
        for row, real in zip(idx, mask, strict=True):
            inner = row[real].tolist()
            assert inner[0] == inner[-1] == separator
            assert inner[1:-1] == list(range(inner[1], inner[1] + len(inner) - 2))
    assert first_tokens <= {int(row[1]) for idx, _ in steps for row in idx}


# ---------------------------------------------------------------------------------------- bounds
def test_bound_against_quadrature():
    """One number in z: log p(x) by summing over a grid, in float64; the bound's s.e. is .007."""
    vae, (idx, mask), n = make(n_latent=1, n_layer=1).double(), texts(3), 100_000
    grid = torch.linspace(-12, 12, 2401, dtype=torch.float64)[:, None]
    log_p = normal_log_prob(grid)
    exact = torch.stack([(log_p - text_nll(vae, x.expand(2401, -1), m.expand(2401, -1), grid)
                          ).logsumexp(0) for x, m in zip(idx, mask, strict=True)])
    exact += math.log(24 / 2400)
    with torch.no_grad():
        mu, logvar = (x.double() for x in vae.encode(idx, mask))
        log_w, nll = sampled_log_weights(vae, idx, mask, mu, logvar, n, generator(0))
    assert ((log_w.logsumexp(1) - math.log(n) - exact).abs() < 0.01).all()
    assert (log_w.mean(1) < exact).all()
    kl = gaussian_kl(mu, logvar).sum(1)  # two ways to the same bound; the odds: 5 s.e.
    difference = log_w.mean(1) + nll.mean(1) + kl
    se = (log_w + nll).std(1) / n**0.5
    assert (difference.abs() < 5 * se + 1e-9).all()
    # more samples, a better bound, in the mean
    means = [(log_w.view(3, -1, k).logsumexp(2) - math.log(k)).mean(1) for k in (1, 4, 20, 100)]
    assert (torch.stack(means).diff(dim=0) > 0).all()


def test_mutual_information_and_active_units():
    """Eight clusters far apart: z says which, log 8 nats; the third number says nothing."""
    corners = torch.tensor([[a, b, 0.0] for a in (-9.0, 0, 9, 18) for b in (-9.0, 9)])
    mu, logvar = corners.repeat(50, 1), torch.zeros(400, 3)
    logvar[:, 2] = 0.0
    found = Latents(mu, logvar, reparametrise(mu, logvar, normal(400)))
    assert found.active_units() == 2
    assert found.mutual_information().mean().item() == pytest.approx(math.log(8), abs=1e-3)
    nothing = Latents(torch.zeros(400, 3), logvar, normal(400))
    assert nothing.active_units() == 0
    assert nothing.mutual_information().abs().max() < 1e-5


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Eight texts of six tokens, whose first tells which; and the tokenizer's stand-in."""
    tokenizer = Numbers(24)
    docs = [[i, *((3 * i + j) % 24 for j in range(5))] for i in range(8)] * 8
    path = tmp_path_factory.mktemp("templates") / "x.bin"
    write_shard(path, docs, tokenizer, 0)
    return Shard.open(path, tokenizer)


def train(shard, steps=250, *, free_bits=0.0, hide=0.0, seed=0, **fields):
    config = VAEConfig(**SIZES | {"n_layer": 1, "n_latent": 2} | fields)
    vae = VAE(config, generator(seed, "vae"))
    optimizers = make_optimizers(vae, lr=1e-2, muon_lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))
    for step in range(steps):
        rng = generator(seed, "step", step)
        idx, mask = document_batch(shard, step, batch_size=16, block_size=12, seed=seed)
        shown = torch.where(torch.rand(idx.shape, generator=rng) < hide, 27, idx)
        h, mu, logvar = vae(idx, mask, shown, torch.randn(16, config.n_latent, generator=rng))
        nll = -linear_logprob(h, vae.head.weight, idx[:, 1:], mask=mask[:, 1:]).logp.sum(1)
        loss, _ = negative_elbo(nll, gaussian_kl(mu, logvar), free_bits=free_bits,
                                weight=min(1.0, 2 * (step + 1) / steps if free_bits else 1.0))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return vae.eval()


@BOTH
def test_z_learns_which_of_eight_texts(templates, arch):
    steps = {"transformer": 250, "lstm": 500}[arch]
    vae = train(templates, steps, free_bits=2.0, hide=0.5, arch=arch)
    numbers, bound = latent.account(vae, templates, samples=16)
    assert numbers["active_units"] >= 1 and len(bound) == numbers["texts"] == 64
    assert numbers["mutual_information_nats_per_sequence"] >= 0.8 * math.log(8)
    assert numbers["shuffled_z_penalty_nats_per_sequence"] > 1
    assert (numbers["reconstruction_nats_per_sequence"] < numbers["iwae_nll_nats_per_sequence"]
            < numbers["neg_elbo_nats_per_sequence"])  # fmt: skip


def test_without_the_tricks_it_collapses(templates):
    vae = train(templates)
    numbers, _ = latent.account(vae, templates, samples=16)
    assert numbers["kl_nats_per_sequence"] < 0.1 and numbers["active_units"] == 0
    plain = train(templates, n_latent=0)
    _, lm = latent.account(plain, templates, samples=1)
    assert lm.mean().item() == pytest.approx(math.log(8), abs=0.1)  # the corpus's entropy
    both = latent.beside(torch.full_like(lm, 2 * lm.mean().item()), lm)
    assert both["iwae_over_lm"] == pytest.approx(2)


def test_between_wants_a_vae_and_two_texts():
    tokenizer = train_bpe(["words"], 261)
    for vae, last, steps in ((make(), " ", 5), (make(), "words", 1), (make(n_latent=0), "x", 5)):
        with pytest.raises(UserError, match="give a VAE, at least 2, and two texts"):
            latent.between(vae, tokenizer, "words", last, steps)
