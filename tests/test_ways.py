"""Which way of running a network is the fastest, measured and recalled; and that a compiled network makes the images of an eager one."""

import json
import os
import shutil

import pytest
import torch
from helpers import SMALL, Plain, small_network
from torch import nn

import fastdiff.sampler
from fastdiff import Sampler, Schedule, UNet, UNetConfig, ways

SCHEDULE = Schedule.linear(50)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ways.json"


def make(model, **options):
    settings = {"shape": SMALL.shape, "num_classes": 3, "steps": 4, "micro_batch": 4, "dtype": torch.float32} | options
    return Sampler(model, SCHEDULE, **settings)


@pytest.fixture
def compilers(monkeypatch):
    """Stands in for the compiler: what it makes of a network, by default the network; and how often it was asked."""
    asked = []

    class Compilers:
        make = staticmethod(lambda call: call)
        count = property(lambda self: len(asked))

    made = Compilers()
    monkeypatch.setattr(fastdiff.sampler, "_compiled", lambda call, **_: asked.append(call) or made.make(call))
    return made


@pytest.fixture
def clock(monkeypatch):
    """A clock that the networks of a test push on, so that a measurement is exact."""
    now = [0.0]
    monkeypatch.setattr(fastdiff.sampler.time, "perf_counter", lambda: now[0])

    def slow(call, milliseconds):
        def slower(*args):
            now[0] += milliseconds / 1e3
            return call(*args)

        return slower

    return slow


def key(model=None, device="cpu", dtype=torch.float32, rows=32):
    return ways.key(model or small_network(), torch.device(device), dtype, rows)


# The file


def test_what_was_measured_is_recalled(cache):
    assert ways.recall("a") == {}
    ways.remember("a", {"eager": 2.5, "compiled": 1.0})
    ways.remember("b", {"eager": 3.0})
    ways.remember("a", {"eager": 4.0})
    assert ways.recall("a") == {"eager": 4.0}
    assert ways.recall("b") == {"eager": 3.0}
    assert json.loads(cache.read_text()) == {"a": {"eager": 4.0}, "b": {"eager": 3.0}}
    assert [p.name for p in cache.parent.iterdir()] == ["ways.json"]  # nothing half written beside it


def test_where_the_file_is(monkeypatch, tmp_path):
    assert ways.path() == tmp_path / "cache" / "ways.json"
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ways.path() == tmp_path / "xdg" / "fastdiff" / "ways.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ways.path() == tmp_path / "home" / ".cache" / "fastdiff" / "ways.json"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", "\"a\"", '{"a": 5}', '{"a": [1, 2]}', '{"a": null}', '{"a": {"eager": "fast"}}', '{"a": {"eager": null}}',
        "\xff\xfe", "\0", "[" * 10**5,
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_ignored_and_replaced(cache, text):
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin1"))
    assert ways.recall("a") == {}
    assert make(small_network(), compile="auto").way.startswith("eager")
    ways.remember("a", {"eager": 1.0})
    assert json.loads(cache.read_text()) == {"a": {"eager": 1.0}}


def test_a_cache_that_cannot_be_written_is_ignored(cache, compilers, monkeypatch, tmp_path):
    cache.parent.write_text("a file where the folder should be")
    ways.remember("a", {"eager": 1.0})
    assert ways.recall("a") == {}
    assert set(make(small_network()).measure(rounds=1)) == {"eager", "compiled"}
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    (tmp_path / "ways.json").mkdir()  # a folder where the file should be
    ways.remember("a", {"eager": 1.0})
    assert ways.recall("a") == {}


def test_compiled_code_is_kept_beside_it(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "my own")
    ways.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "my own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    ways.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.parent / "inductor")


# What a measurement holds for


def test_a_measurement_holds_for_networks_of_the_same_shape():
    assert key() == key(small_network(seed=1))
    other_shape = UNet(UNetConfig(**SMALL.config | {"embedding": 64}))
    linear, convolution = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Conv2d(3, 3, 1))

    class Other(UNet):
        pass

    different = [
        key(), key(other_shape), key(rows=64), key(dtype=torch.bfloat16), key(Plain(torch.sin, small_network())), key(linear), key(convolution),
        key(Other(SMALL)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_a_measurement_holds_for_one_version_of_torch(monkeypatch):
    before = key()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert key() != before


# measure()


@pytest.mark.parametrize(("eager", "compiled", "way"), [(5, 2, "compiled"), (2, 5, "eager")])
@pytest.mark.parametrize("guided", [False, True])
def test_the_fastest_way_is_taken_and_recalled(cache, compilers, clock, eager, compiled, way, guided):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.call = clock(lambda x, t, labels: 0.1 * x + self.weight[0], eager)

        def forward(self, x, t, labels):
            return self.call(x, t, labels)

    compilers.make = lambda call: clock(lambda x, t, labels: 0.1 * x, compiled)
    model = Slow()
    sampler = make(model)
    images = sampler(3, labels=1)
    assert sampler.way == "eager"
    found = sampler.measure(guided=guided)
    assert found == pytest.approx({"eager": eager, "compiled": compiled})
    assert sampler.way == way
    assert list(json.loads(cache.read_text()).values()) == [pytest.approx(found)]
    assert make(Slow()).way == way  # another one like it
    assert make(Slow(), dtype=torch.bfloat16).way == "eager"
    assert make(Slow(), compile=False).way == "eager"
    assert make(Slow(), compile=True).way == "compiled"
    before = compilers.count
    torch.testing.assert_close(sampler(3, labels=1), images, atol=0, rtol=0)
    assert compilers.count == before + (way == "compiled")


def test_measuring_leaves_what_was_asked_for(compilers, clock):
    """compile=False stays so whatever is the fastest."""
    model = Plain(clock(lambda x, t, labels: 0.1 * x, 5))
    compilers.make = lambda call: lambda x, t, labels: 0.1 * x
    sampler = make(model, compile=False)
    assert sampler.measure()["compiled"] < 1
    assert sampler.way == "eager"


def test_measure_takes_the_median_of_interleaved_rounds(compilers, clock):
    """One slow call in the middle of it does not count."""
    times = iter([1.0] * 4 + [500.0] + [1.0] * 100)
    model = Plain(lambda x, t, labels: clock(lambda x: 0.1 * x, next(times))(x))
    compilers.make = lambda call: clock(lambda x, t, labels: 0.1 * x, 3.0)
    assert make(model, compile=False).measure(rounds=3) == pytest.approx({"eager": 1.0, "compiled": 3.0})


def test_a_network_that_cannot_be_compiled_is_measured_as_it_is(cache, compilers):
    def fails(call):
        raise RuntimeError("no such operator\nand more of it")

    compilers.make = fails
    sampler = make(small_network())
    with pytest.warns(UserWarning, match="the network cannot be compiled here: no such operator$"):
        assert set(sampler.measure(rounds=1)) == {"eager"}
    assert make(small_network()).way == "eager"


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.9},
        {"solver": "unipc", "order": 3, "spacing": "logsnr"},
        {"timesteps": [40, 20, 3]},
        {"clip": None, "prediction": "v"},
        {"num_classes": None},
    ],
    ids=str,
)
def test_any_sampler_can_be_measured_and_is_the_same_afterwards(compilers, options):
    sampler = make(small_network(), **options)
    before = sampler(3, seed=1)
    assert set(sampler.measure(rounds=1)) == {"eager", "compiled"}
    assert torch.equal(sampler(3, seed=1), before)


# The compiler itself


@needs_compiler
def test_compiled_on_the_cpu(monkeypatch, tmp_path):
    """Guided rows and others, in one call too; dropout asleep; a whole micro-batch and a part of one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(8, 3, 3, padding=1))

        def forward(self, x, t, labels):
            return self.layers(x + labels.reshape(-1, 1, 1, 1) / 4) * (1 + t.reshape(-1, 1, 1, 1) / 50)

    model = Small()
    eager, compiled = (make(model, compile=which, micro_batch=4) for which in (False, True))
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    labels = torch.tensor([0, 1, 2, 2, 1])
    for call in ({}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": (20, 40)}):
        got = compiled(5, labels=labels, **call)
        # Compiled code fuses, and so rounds at other places.
        torch.testing.assert_close(got, eager(5, labels=labels, **call), atol=1e-5, rtol=0)
        assert torch.equal(compiled(2, first=3, labels=labels[3:], **call), got[3:])
    assert model.training
    assert compiled.way == "compiled"
    assert counters["stats"]["unique_graphs"] == 2  # of a micro-batch, and of both halves of a guided one
    torch.compiler.reset()
    kept = compiled(5, labels=labels)
    assert torch.equal(make(model, compile=True)(5, labels=labels), kept)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(compiled(5, labels=labels), kept)  # of the weights that it has built in
    assert not torch.equal(eager(5, labels=labels), kept)


@needs_cuda
def test_compiled_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = small_network().to("cuda")
    eager, compiled = (make(network, compile=which) for which in (False, True))
    for guidance in (1.0, 2.0):
        want = eager(5, labels=1, guidance=guidance)
        torch.testing.assert_close(compiled(5, labels=1, guidance=guidance), want, atol=1e-3, rtol=0)
    assert compiled.way == "compiled, captured"
