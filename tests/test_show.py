"""The pictures hold what the library says, to the bit, and the command draws them; bad input is one line, exit code 2 and nothing written."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, small_checkpoint, small_network
from PIL import Image

import fastdiff
from fastdiff import Checkpoint, Schedule, cli, data, gallery, noise, show
from fastdiff.gallery import Options

ROOT = Path(__file__).parent.parent
FILES = {
    "forward": ["forward.gif", "forward.png", "forward_guess.png"],
    "reverse": ["reverse.gif", "reverse.png"],
    "posterior": ["posterior.png"],
    "guidance": ["guidance.png", "mixtures.png"],
    "solvers": ["solvers.png"],
    "interpolate": ["interpolate.gif", "interpolate.png"],
    "likelihood": ["likelihood.png"],
}


def checkpoint():
    """Random weights, but a schedule that goes from clean to noise."""
    return replace(small_checkpoint(), schedule=Schedule.cosine(50))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    checkpoint().save(path)
    return str(path)


@pytest.fixture
def figures(monkeypatch):
    """What `figure` was called with: (rows, keywords)."""
    calls = []

    def watched(rows, **settings):
        calls.append(([list(row) for row in rows], settings))
        return figure(rows, **settings)

    figure = gallery.figure
    monkeypatch.setattr(gallery, "figure", watched)
    return calls


def draw(kind, folder, **options):
    return gallery.KINDS[kind](checkpoint(), folder, Options(device="cpu", **options))


def pixels(images):
    return list(data.to_uint8(images).numpy())


def same(row, wanted):
    return len(row) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(row, wanted, strict=True))


def frames(path):
    with Image.open(path) as film:
        return film.n_frames


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_writes_its_files_and_says_what_is_in_them(kind, tmp_path):
    options = {"scale": 4} if kind in ("forward", "likelihood") else {"scale": 4, "steps": (4,)}
    made = draw(kind, tmp_path / "a", **options)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == FILES[kind] == sorted(m.path.name for m in made)
    for picture in made:
        with Image.open(picture.path) as image:
            image.verify()
            assert image.format == ("GIF" if picture.path.suffix == ".gif" else "PNG")
            assert min(image.size) > 90
        assert picture.title
        assert len(picture.text) > 30
    if kind != "solvers":  # whose times are each run's own
        again = draw(kind, tmp_path / "b", **options)
        assert [m.path.read_bytes() for m in again] == [m.path.read_bytes() for m in made]
        other = draw(kind, tmp_path / "c", **options, seed=1)
        assert all(m.path.read_bytes() != n.path.read_bytes() for m, n in zip(made, other, strict=True))


def test_forward_is_a_sprite_with_more_and_more_of_one_noise(figures, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    draw("forward", tmp_path, image=str(tmp_path / "mine.png"))
    (noisy,), settings = figures[0]
    assert settings["columns"][:1] + settings["columns"][-1:] == ["clean", "no idea"]
    assert {"some noise", "only an outline"} < set(settings["columns"])
    x0 = np.asarray(Image.open(tmp_path / "mine.png"))
    assert np.array_equal(noisy[0], x0)
    z = noise.normal(0, [0], 0, (3, 8, 8), stream="draw")
    last = 0.0
    for (ratio, _), tile, (_, _, says) in list(zip(gallery.LEVELS, noisy, settings["under"][0], strict=True))[1:]:
        alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        wanted = pixels(alpha * data.to_float(torch.from_numpy(x0[None].copy())) + sigma * z)[0]
        assert np.abs(wanted.astype(int) - tile).max() <= 1
        assert says == f"{100 * sigma**2:.0f} % noise"
        assert sigma > last
        last = sigma
    assert np.abs(noisy[-1].astype(int) - pixels(z)[0]).mean() < 10  # nothing of it is left
    assert frames(tmp_path / "forward.gif") == 26


def test_the_guess_is_what_the_sampler_takes_for_x0():
    net = checkpoint()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = net.sampler(solver="ddim", timesteps=[30], clip=None, device="cpu").trajectory(5, rows=[0], latents=x, labels=1).x0[0]
    torch.testing.assert_close(gallery.guess(net, x, 30, 1), wanted, rtol=1e-5, atol=1e-5)


def test_reverse_starts_at_the_seeds_noise_and_ends_at_the_samplers_images(figures, tmp_path):
    draw("reverse", tmp_path, seed=3, steps=(12,), solver=("ddim",))
    rows, settings = figures[0]
    sampler = checkpoint().sampler(solver="ddim", steps=12, device="cpu")
    labels = [k for k in (0, 1, 2, 0) for _ in range(8)]
    path = sampler.trajectory(32, rows=range(12), seed=3, labels=labels)
    start = pixels(sampler.table.start * noise.normal(3, range(32), 0, (3, 8, 8), stream="start"))
    ends = pixels(path.images)
    assert [len(rows), rows[0][0].shape] == [6, (8, 8, 3)]
    for i, sample in enumerate((0, 8, 16)):
        x, guesses = rows[2 * i : 2 * i + 2]
        assert np.array_equal(x[0], start[sample])
        assert np.array_equal(x[-1], ends[sample]) and np.array_equal(guesses[-1], ends[sample])
        assert np.array_equal(guesses[0], pixels(path.x0[0])[sample])
    shares = [int(says.split()[0]) for says in settings["columns"][:-1]]
    assert shares == sorted(shares, reverse=True) and shares[0] == 100
    # The film: four rows of eight on either side, from noise to the end.
    films = [call for call in figures[1:] if "gauge" in call[1]]
    assert len(films) == frames(tmp_path / "reverse.gif")
    assert [len(films[0][0]), len(films[0][0][0])] == [4, 16]
    assert same([tile for row in films[0][0] for tile in row[:8]], start)
    assert same([tile for row in films[-1][0] for tile in row[:8]], ends)


def test_posterior_has_one_noisy_sprite_and_its_many_completions(figures, tmp_path):
    draw("posterior", tmp_path, seed=5, steps=(20,))
    (clean, many) = figures
    assert np.array_equal(clean[0][0][0], gallery._sprites(checkpoint(), Options(device="cpu", seed=5), 1)[0])
    noisy = clean[0][0][1:] + clean[0][1][1:]
    assert clean[0][1][0] is None and len({tile.tobytes() for tile in noisy}) == len(noisy)
    spreads = []
    x0 = data.to_float(torch.from_numpy(clean[0][0][0][None]))
    for row, strength in zip(many[0], (0.3, 0.45, 0.6, 0.75), strict=True):
        table = fastdiff.solvers.table("ddpm", Schedule.cosine(50), steps=20, strength=strength)
        alpha, sigma = table.levels[0]
        z = noise.normal(5, [0], 0, (3, 8, 8), stream="start")
        assert np.array_equal(row[0], pixels(alpha * x0 + sigma * z)[0])
        completions = np.stack(row[1:-2]).astype(float)
        spreads.append(completions.std(0).mean())
        assert len({tile.tobytes() for tile in row[1:-2]}) == len(row) - 3
    assert spreads[0] < spreads[-1]
    assert [text.split()[0] for text in many[1]["labels"]] == sorted(text.split()[0] for text in many[1]["labels"])


def test_the_same_seeds_stand_over_one_another_at_every_guidance(figures, tmp_path):
    draw("guidance", tmp_path, seed=4, label=2, steps=(5,), solver=("ddim",))
    rows, settings = figures[0]
    assert [text.split("\n")[0] for text in settings["labels"]] == ["w = 0", "w = 1", "w = 2", "w = 4", "w = 8"]
    sampler = checkpoint().sampler(solver="ddim", steps=5, device="cpu")
    seeds = range(4, 14)
    # The network's own arithmetic in another batch may differ in a bit, so in a level.
    for row, wanted in (
        (rows[0], sampler(10, seeds=seeds)),
        (rows[1], sampler(10, seeds=seeds, labels=2)),
        (rows[3], sampler(10, seeds=seeds, labels=2, guidance=4.0)),
    ):
        assert np.abs(np.stack(row).astype(int) - np.stack(pixels(wanted))).max() <= 1


def test_mixtures_end_at_either_class(figures, tmp_path):
    draw("guidance", tmp_path, seed=4, label=2, steps=(5,), solver=("ddim",))
    rows, settings = figures[1]
    assert settings["labels"][0] == "100 % 10\n0 % cat" and settings["labels"][-1] == "0 % 10\n100 % cat"
    sampler = checkpoint().sampler(solver="ddim", steps=5, device="cpu")
    for row, label in ((rows[0], 2), (rows[-1], 0)):
        wanted = pixels(sampler(10, seeds=range(4, 14), labels=label, guidance=gallery.GUIDANCE))
        assert np.abs(np.stack(row).astype(int) - np.stack(wanted)).max() <= 1
    assert len({row[0].tobytes() for row in rows}) == 5


def test_a_mixture_is_the_average_of_two_classes_and_has_their_null():
    network = small_network()
    x, t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 10.0, 20.0, 30.0])
    mixture = gallery.Mixture(network, 0, 2, torch.tensor([0.0, 0.25, 1.0]), null=3)
    first, second, free = (network(x, t, torch.full((4,), k)) for k in (0, 2, 3))
    said = mixture(x, t, torch.tensor([0, 1, 2, 3]))
    wanted = [first[0], 0.75 * first[1] + 0.25 * second[1], second[2], free[3]]
    torch.testing.assert_close(said, torch.stack(wanted))


def test_solvers_stand_beside_one_another_from_the_same_noise(figures, tmp_path):
    draw("solvers", tmp_path, seed=2, steps=(3, 9), solver=("ddim", "heun"))
    rows, settings = figures[0]
    assert settings["labels"] == ["ddim", "heun"]
    assert [text for _, _, text in settings["over"]] == ["3 evaluations", "9 evaluations"]
    net, labels = checkpoint(), [(0, 1, 2)[i % 3] for i in range(16)]
    for row, (solver, steps) in zip(rows, (("ddim", (3, 9)), ("heun", (2, 5))), strict=True):
        for place, count in enumerate(steps):
            sampler = net.sampler(solver=solver, steps=count, device="cpu")
            assert len(sampler.table) == (3, 9)[place]  # as many looks, however many steps
            wanted = pixels(sampler(16, seed=2, labels=labels, guidance=gallery.GUIDANCE))[:3]
            assert same(row[3 * place : 3 * place + 3], wanted)
    assert all(text.endswith(" s") and float(text[:-2]) >= 0 for line in settings["under"] for _, _, text in line)


def test_interpolation_ends_at_the_images_of_the_two_seeds(figures, tmp_path):
    draw("interpolate", tmp_path, seed=6, steps=(5,))
    rows, settings = figures[0]
    sampler = checkpoint().sampler(solver="unipc", steps=5, device="cpu")
    assert len(rows) == len(settings["labels"]) == 5
    for r, row in enumerate(rows):
        assert settings["labels"][r].startswith(f"seeds {6 + 2 * r}, {7 + 2 * r}\n")
        ends = pixels(sampler(2, seeds=[6 + 2 * r, 7 + 2 * r], labels=r % 3, guidance=gallery.GUIDANCE))
        assert same([row[0], row[-1]], ends)
    assert frames(tmp_path / "interpolate.gif") == 2 * 17 - 2  # there and back
    assert same(figures[1][0][0], [row[0] for row in rows]) and same(figures[17][0][0], [row[-1] for row in rows])


def test_likelihood_says_the_models_own_bits(figures, tmp_path):
    draw("likelihood", tmp_path)
    rows, settings = figures[0]
    assert [len(row) for row in rows] == [6, 6, 6, 6, 6, 1]
    assert np.array_equal(rows[2][0], rows[0][0][::-1])
    for image, shuffled in zip(rows[0], rows[3], strict=True):
        assert not np.array_equal(image, shuffled)
        assert np.array_equal(*(np.sort(v.reshape(-1, 3), axis=0) for v in (image, shuffled)))
    images = torch.from_numpy(np.stack([tile for row in rows for tile in row])).permute(0, 3, 1, 2)
    net = checkpoint()
    p = fastdiff.log_likelihood(net.model, net.schedule, fastdiff.dequantised(images), prediction="epsilon", steps=24, probes=1)
    said = [float(text) for line in settings["under"] for _, _, text in line]
    assert said == pytest.approx(p.bits_per_dim().tolist(), abs=0.011)  # to two places, in batches of another size


def test_shipped_sprites_are_taken_where_the_network_knows_them():
    shipped = fastdiff.load("sprites")
    _, held = data.load().split()
    sprites = gallery._sprites(shipped, Options(device="cpu", label=3), 4)
    known = {image.tobytes() for image in held.images[held.labels == 3]}
    assert {sprite.tobytes() for sprite in sprites} <= known
    assert np.array_equal(gallery._picture(shipped, Options(device="cpu", image="17")), data.load().images[17])


@pytest.mark.parametrize(("name", "mode", "size"), [("a.png", "RGBA", (8, 8)), ("b.gif", "P", (16, 16)), ("c.bmp", "L", (5, 11))])
def test_an_image_of_any_kind_becomes_one_of_the_networks(tmp_path, name, mode, size):
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste((200, 40, 40, 255), (0, 0, size[0], size[1] // 2))
    picture.convert(mode).save(tmp_path / name)
    for channels in (1, 3):
        net = Checkpoint(small_network(config=replace(SMALL, shape=(channels, 8, 8))), Schedule.cosine(50), "epsilon", ("a", "b", "c"))
        found = gallery._picture(net, Options(device="cpu", image=str(tmp_path / name)))
        assert found.shape == (8, 8, channels) and found.dtype == np.uint8
    if mode == "RGBA":
        assert (found[:4] == [200, 40, 40]).all() and (found[4:] == 255).all()  # clear is white


def test_networks_without_classes_have_pictures_too(tmp_path):
    net = Checkpoint(small_network(config=replace(SMALL, num_classes=None)), Schedule.cosine(50), "epsilon")
    for kind in ("forward", "reverse", "posterior", "solvers", "interpolate", "likelihood"):
        made = gallery.KINDS[kind](net, tmp_path, Options(device="cpu", steps=(3,), scale=4))
        assert sorted(m.path.name for m in made) == FILES[kind]
    with pytest.raises(ValueError, match="guidance needs a network with classes, and this checkpoint has none"):
        gallery.KINDS["guidance"](net, tmp_path, Options(device="cpu"))


@pytest.mark.parametrize("shown", ["v", "flow"])
def test_other_schedules_and_predictions(tmp_path, shown):
    net = replace(small_checkpoint(), schedule=Schedule.flow(50) if shown == "flow" else Schedule.cosine(50), prediction=shown)
    options = Options(device="cpu", steps=(10,), scale=4)
    made = [picture for kind in ("forward", "reverse", "posterior") for picture in gallery.KINDS[kind](net, tmp_path, options)]
    assert len(made) == 6
    if shown == "flow":
        with pytest.raises(ValueError, match="a likelihood needs a network that says epsilon, v or x0"):
            gallery.KINDS["likelihood"](net, tmp_path, Options(device="cpu"))


def test_the_command_writes_and_says_where(net, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        show.main(["reverse", "--checkpoint", net, "--steps", "3", "--label", "dog", "--scale", "2", "--device", "cpu", "--seed", "9"]) == 0
    )
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [
        "show/reverse.png  Out of noise: first an outline, then detail",
        "show/reverse.gif  Thirty-two sprites at once",
    ]
    assert "reverse" in stderr and "step/s" in stderr  # a progress bar
    assert sorted(p.name for p in Path("show").iterdir()) == FILES["reverse"]
    alone = gallery.KINDS["reverse"](fastdiff.load(net), tmp_path / "b", Options(device="cpu", steps=(3,), label=1, scale=2, seed=9))
    assert [m.path.read_bytes() for m in alone] == [Path(f"show/{m.path.name}").read_bytes() for m in alone]
    Path("show/notes.txt").write_text("keep me")
    show.main(["forward", "--checkpoint", net, "--device", "cpu", "--image", "3"])
    assert sorted(p.name for p in Path("show").iterdir()) == sorted([*FILES["reverse"], *FILES["forward"], "notes.txt"])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "the following arguments are required: KIND"),
        (["film"], "argument KIND: invalid choice: 'film'"),
        (["forward", "--label", "bird"], "no class 'bird' in NET; it has: 0 cat, 1 dog, 2 10"),
        (["forward", "--label", "7"], "no class '7' in NET"),
        (["forward", "--image", "nowhere.png"], "no image 'nowhere.png'; give an image file, or the number of a shipped sprite"),
        (["forward", "--image", "file"], "file is not a readable image (UnidentifiedImageError); give one of PNG, JPEG"),
        (["forward", "--image", "."], ". is not a readable image (OSError)"),
        (["posterior", "--image", "99999999"], "no shipped sprite 99999999; they have the numbers 0 to "),
        (["forward", "--solver", "ddim"], "unrecognized arguments: --solver ddim"),
        (["reverse", "--solver", "eulr"], "unknown solver 'eulr'; known: ddpm, "),
        (["reverse", "--solver", "ddim", "--solver", "heun"], "--solver was given 2 times; this picture takes one"),
        (["reverse", "--steps", "0"], "argument --steps: '0' is not a whole number at least 1"),
        (["guidance", "--steps", "51"], "steps is 51; this schedule has 50 timesteps, so give a whole number from 1 to 50"),
        (["solvers", "--steps", "5", "--steps", "60"], "steps is 60; this schedule has 50 timesteps"),
        (["solvers", "--solver", "ddim", "--solver", "hun"], "unknown solver 'hun'"),
        (["posterior", "--solver", "ddim"], "solver 'ddim' adds no noise, so a noisy sprite would have one completion; take ddpm"),
        (["interpolate", "--solver", "ddpm"], "solver 'ddpm' adds noise, so a seed's noise alone does not decide its image; take ddim"),
        (["reverse", "--scale", "0"], "argument --scale: '0' is not a whole number from 1 to 32"),
        (["reverse", "--seed", "-1"], "argument --seed: '-1' is not"),
        (["reverse", "--device", "gpu"], "unknown device 'gpu'"),
        (["reverse", "--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
        (["likelihood", "--out", "file"], "cannot write to the folder file"),
        (["forward", "--out", "/proc/nowhere"], "cannot write to the folder /proc/nowhere"),
        (["tour", "--out", "file"], "cannot write to the folder file"),
        (["tour", "--label", "bird"], "no class 'bird' in NET"),
        (["field", "--out", "file"], "cannot write to the folder file"),
        (["field", "--label", "cat"], "unrecognized arguments: --label cat"),
    ],
)
def test_bad_input_is_one_line(net, tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no picture, no folder")
    if flags and flags[0] not in ("field", "film"):
        flags = [flags[0], "--checkpoint", net, "--device", "cpu", *flags[1:]]
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: show.main(flags), show.PROG)
    assert caught.value.code == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert text.replace("NET", net) in stderr
    assert stderr.count("\n") == 1
    assert stderr.startswith("python -m fastdiff.show")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert Path("file").read_text() == "no picture, no folder"


def test_a_full_disk_keeps_the_old_pictures(net, tmp_path, monkeypatch):
    (before,) = (m.path.read_bytes() for m in draw("posterior", tmp_path, steps=(3,)))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        draw("posterior", tmp_path, steps=(3,), seed=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"posterior.png": before}


def test_without_matplotlib_the_field_names_what_is_missing(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from fastdiff import cli, show; cli.run(lambda: show.main(['field']), show.PROG)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "matplotlib" in done.stderr and "plot" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [None, *show.KINDS])
def test_help_explains(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        show.main([kind, "--help"] if kind else ["--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    if kind is None:
        for name, (line, _, _) in show.KINDS.items():
            assert f"{name} {line}" in said
        return
    _, text, own = show.KINDS[kind]
    assert text in said
    assert all(f"--{name}" in said for name in ("out", "seed", *own))
    for name in FILES.get(kind, []):
        assert name in said  # what it writes
