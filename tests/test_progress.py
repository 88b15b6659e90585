"""How far a run is and when it will end, on a clock of the test's own."""

import contextlib
import json
import threading
import time

import numpy as np
import pytest

from fastdiff.distributed import Group
from fastdiff.progress import WINDOW_S, Progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def make(progress, clock, images, seconds, steps=10):
    """One micro-batch, in so many steps, that takes so long."""
    with progress.part(images)(steps) as part:
        for _ in range(steps):
            clock.now += seconds / steps
            part.update()


def test_a_steady_rate_is_foretold_within_a_tenth_after_the_first_minute(clock, capsys):
    rng, total, each = np.random.default_rng(0), 30_000, 50
    end, said = [], []
    with Progress(total, as_json=True, clock=clock) as progress:
        began = clock.now
        for _ in range(total // each):
            make(progress, clock, each, 1.0 * rng.lognormal(0, 0.4))
            said += [(clock.now, line) for line in lines(capsys)]
        end = clock.now
    late = [(now, line) for now, line in said if now - began >= 60 and end - now > 30]
    assert len(late) > 40
    for now, line in late:
        assert line["eta_s"] == pytest.approx(end - now, rel=0.1), now - began


def test_a_rate_that_halves_is_believed_once_the_window_is_past(clock, capsys):
    total, each, said = 60_000, 50, []
    with Progress(total, as_json=True, clock=clock) as progress:
        for k in range(total // each):
            if k == 600:
                slower = clock.now
            make(progress, clock, each, 1.0 if k < 600 else 2.0)
            said += [(clock.now, line) for line in lines(capsys)]
        end = clock.now
    past = [(now, line) for now, line in said if now - slower > WINDOW_S + 5 and end - now > 30]
    assert len(past) > 50
    for now, line in past:
        assert line["eta_s"] == pytest.approx(end - now, rel=0.1)
        assert line["images_per_s"] == pytest.approx(25, rel=0.05)
    # One rate for all of the run, as tqdm has it, would be wrong by more for long.
    assert any(abs((total - line["images"]) / (line["images"] / (now - 1000)) / (end - now) - 1) > 0.25 for now, line in past)


def test_lines_come_while_nothing_is_made(capsys, monkeypatch):
    """As while a rank waits for the others."""
    monkeypatch.setattr("fastdiff.progress.TELL_S", 0.01)
    with Progress(10, as_json=True, every=0.05):
        time.sleep(1)
    said = lines(capsys)
    assert len(said) >= 3 and all(line["images"] == 0 for line in said)
    before = {thread.name for thread in threading.enumerate()}
    assert "fastdiff-progress" not in before


def test_others_that_end_meanwhile_are_found_out_by_who_works(monkeypatch):
    monkeypatch.setattr("fastdiff.progress.TELL_S", 0.01)

    class Gone(Group):
        def add(self, name, number):
            raise ConnectionError("another process of this job has ended")

    with contextlib.suppress(ConnectionError), Progress(10, as_json=True, every=0.02, group=Gone(0, 2)) as progress:
        time.sleep(0.3)
        assert not progress.teller.is_alive()
        with pytest.raises(ConnectionError):
            progress.move(1, complete=True)


def test_what_is_taken_back_leaves_no_rate_below_nothing(clock):
    with Progress(1000, as_json=True, clock=clock) as progress:
        clock.now += 1
        with contextlib.suppress(KeyboardInterrupt), progress.part(10)(3) as part:
            for _ in range(2):
                part.update()
            raise KeyboardInterrupt
        progress.partial -= 1e-9
        assert progress.rate() == 0 and progress.eta() is None


def test_what_was_there_before_is_no_part_of_the_rate(clock):
    with Progress(10_000, 9_000, as_json=True, clock=clock) as progress:
        assert (progress.images, progress.rate(), progress.eta()) == (9_000, 0, None)
        for _ in range(20):
            make(progress, clock, 10, 5)
        assert progress.images == 9_200
        assert progress.rate() == pytest.approx(2)
        assert progress.eta() == pytest.approx(400)


def test_lines_are_json_no_closer_than_asked_and_only_rise(clock, capsys):
    with Progress(1_000, 100, as_json=True, every=10, clock=clock) as progress:
        assert lines(capsys) == []
        times, said = [], []
        for _ in range(900):
            make(progress, clock, 1, 0.3, steps=1)
            new = lines(capsys)
            assert len(new) <= 1
            said += new
            times += [clock.now] * len(new)
        assert progress.images == 1_000
    for line in said:
        assert line.keys() == {"event", "images", "of", "images_per_s", "eta_s"}
        assert (line["event"], line["of"]) == ("progress", 1_000)
    assert len(said) > 20
    assert min(np.diff(times)) >= 10
    counts = [line["images"] for line in said]
    assert counts == sorted(counts)
    assert counts[0] > 100 and counts[-1] <= 1_000
    # A line says what is there when it is said: within an image or two of the truth.
    for now, line in zip(times, said, strict=True):
        assert line["images"] == pytest.approx(100 + (now - 1000) / 3 * 10, abs=2)


def test_the_last_line_says_what_is_there(clock, capsys):
    with Progress(40, as_json=True, every=10, clock=clock) as progress:
        for _ in range(4):
            make(progress, clock, 10, 10, steps=1)
    assert lines(capsys)[-1] == {"event": "progress", "images": 40, "of": 40, "images_per_s": 1.0, "eta_s": 0.0}


class Shared:
    """A store of counters that several ranks share, as torchrun's is."""

    def __init__(self):
        self.counts, self.lock = {}, threading.Lock()

    def add(self, name, number):
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + number
            return self.counts[name]


def test_several_ranks_are_summed_and_rank_0_speaks(clock, capsys):
    store = Shared()
    ranks = [Progress(4_000, 1_000, group=Group(rank, 3, store=store), as_json=True, clock=clock) for rank in range(3)]
    said = []
    for _ in range(10):
        began = clock.now
        for rank, progress in enumerate(ranks):
            clock.now = began
            make(progress, clock, 100, 30 if rank else 20)  # at the same time
            new = lines(capsys)
            assert not new or rank == 0
            said += new
    with ranks[0] as progress:
        pass  # what came after its own last part
    assert progress.images == 4_000
    assert 1_000 + 9 * 300 < said[-1]["images"] <= 1_000 + 9 * 300 + 100
    assert progress.rate() == pytest.approx(10, rel=0.1)
    for progress in ranks:
        progress.bar.close()


def test_a_bar_shows_what_all_ranks_have_made(clock, capsys):
    store = Shared()
    other = Progress(20, group=Group(1, 2, store=store), clock=clock)
    with Progress(20, group=Group(0, 2, store=store), clock=clock) as progress:
        make(progress, clock, 10, 1)
        make(other, clock, 10, 1)
    assert "20/20" in capsys.readouterr().err
    other.bar.close()


def test_a_part_may_be_counted_by_several_threads(clock):
    with Progress(10_000_000, as_json=True, every=1e9, clock=clock) as progress:
        for images, steps in ((7, 4_000), (10, 3)):
            before = progress.images
            with progress.part(images)(steps) as part:
                threads = [threading.Thread(target=lambda p=part, s=steps: [p.update() for _ in range(s)]) for _ in range(4)]  # too many
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert part.left == 0
            assert progress.images == before + images
            assert progress.partial == 0


def test_an_error_inside_a_part_does_not_count_it(clock):
    with Progress(100, as_json=True, clock=clock) as progress:
        make(progress, clock, 10, 1)
        for _ in range(3):
            with contextlib.suppress(MemoryError), progress.part(10)(4) as part:
                part.update(3)
                assert progress.images == 17
                raise MemoryError
            assert progress.images == 10
        for _ in range(9):
            make(progress, clock, 10, 1)
        assert (progress.images, progress.complete) == (100, 100)


def test_parts_of_any_number_of_steps_are_whole_in_the_end(clock):
    with Progress(1_000, as_json=True, clock=clock) as progress:
        for i, steps in enumerate((1, 3, 7, 0, 50)):
            with progress.part(13)(steps) as part:
                part.update(steps // 2)
            assert progress.images == 13 * (i + 1)
        with progress.part(13)(5) as part:
            part.update(10_000)
            assert progress.images == 13 * 6


def test_a_clock_that_stands_still_divides_by_nothing(clock, capsys):
    with Progress(10, clock=clock) as progress:
        with progress.part(5)(1) as part:
            part.update()
        assert (progress.rate(), progress.eta()) == (0, None)
    with Progress(10, clock=clock, as_json=True, every=0) as progress, progress.part(5)(1) as part:
        part.update()
    assert all(line["eta_s"] is None for line in lines(capsys))


def test_nothing_goes_to_stdout_beside_a_bar(clock, capsys):
    with Progress(10, 5, clock=clock) as progress:
        make(progress, clock, 5, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err
