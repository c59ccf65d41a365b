"""How much privacy was spent: the events of a run, evaluated by `dp-accounting`.

Events are kept run-length encoded, as most of a run's steps cost the same.
"""

from __future__ import annotations

import copy
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_curv.optimizers.privacy.schedule import Schedule, runs_of
from lightning_curv.optimizers.settings import require_choice, require_positive

METHODS = ("pld", "rdp")
_INTERVAL = 1e-4  # of the discretized privacy loss; a coarser one overestimates ε
_COARSE = 1e-3
# Less noise costs an ε of thousands, and an array of 10⁸ losses of privacy or more.
LEAST_NOISE = 0.01
NEIGHBOURS = {
    "ADD_OR_REMOVE_ONE": "one sample added or removed",
    "REPLACE_SPECIAL": "one sample zeroed out, data set size public",
}


@dataclass(frozen=True)
class Sampling(ABC):
    """How the samples of a step were drawn, and what one release of it costs.

    The sampling, and the noise multiplier σ of a release, are all that an account is made of.

    Attributes:
        relation: Which data sets are neighbours, as `dp_accounting.NeighboringRelation` names it.
    """

    relation = "ADD_OR_REMOVE_ONE"

    @abstractmethod
    def event(self, noise_multiplier: float) -> Any:
        """The `dp_accounting.DpEvent` of one release.

        Args:
            noise_multiplier: σ.

        Returns:
            The event, to be composed by an accountant of that library.
        """

    @property
    def neighbours(self) -> str:
        """Which data sets are neighbours, in words."""
        return NEIGHBOURS[self.relation]


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Every sample takes part in a step with probability `sampling_rate`, independently.

    Neighbours differ by one sample that is added or removed.

    Args:
        sampling_rate: q = expected batch size / data set size, in (0, 1].

    Raises:
        ValueError: q is out of range.

    Example:
        >>> PoissonSampling(sampling_rate=256 / 60000).neighbours
        'one sample added or removed'
    """

    sampling_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"`sampling_rate` must lie in (0, 1], found {self.sampling_rate}: it is the "
                "expected batch size divided by the size of the data set."
            )

    def event(self, noise_multiplier: float) -> Any:
        """A Poisson-sampled Gaussian per step."""
        da = _library()
        # A sample is absent from some steps, and nobody knows from which: that amplifies privacy.
        return da.PoissonSampledDpEvent(self.sampling_rate, da.GaussianDpEvent(noise_multiplier))


@dataclass(frozen=True)
class TruncatedPoissonSampling(PoissonSampling):
    """Poisson sampling of which at most `max_batch_size` samples are kept, drawn uniformly.

    Neighbours differ by one sample replaced by a null sample: the size of the data set is public.
    See `dp_accounting.TruncatedSubsampledGaussianDpEvent`.

    Args:
        sampling_rate: q in (0, 1], before the batch is truncated.
        dataset_size: Number of samples.
        max_batch_size: Largest number of samples of a step.

    Raises:
        ValueError: q is out of range.

    Example:
        >>> sampling = TruncatedPoissonSampling(0.01, dataset_size=1000, max_batch_size=20)
        >>> sampling.neighbours
        'one sample zeroed out, data set size public'
    """

    dataset_size: int
    max_batch_size: int
    relation = "REPLACE_SPECIAL"

    def event(self, noise_multiplier: float) -> Any:
        """A truncated Poisson-sampled Gaussian per step."""
        return _library().TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.dataset_size,
            sampling_probability=self.sampling_rate,
            truncated_batch_size=self.max_batch_size,
            noise_multiplier=noise_multiplier,
        )


@dataclass(frozen=True)
class EpochSampling(Sampling):
    """Any order in which every sample takes part at most once per epoch.

    One Gaussian per *epoch* is accounted, without amplification by sampling.

    Neighbours differ by one sample whose gradient is replaced by zero ("zero-out"): the batches
    stay what they are. If a sample were added or removed instead, all others could move to other
    batches of a fixed size, and every step of the epoch would change by up to 2C.

    Args:
        steps_per_epoch: Optimizer steps of an epoch.

    Example:
        >>> accountant = PrivacyAccountant(EpochSampling(steps_per_epoch=3))
        >>> for _ in range(6):
        ...     accountant.step(noise_multiplier=1.0)
        >>> sum(releases for _, _, releases in accountant.history)  # two epochs
        2
    """

    steps_per_epoch: int
    relation = "REPLACE_SPECIAL"

    def event(self, noise_multiplier: float) -> Any:
        """A Gaussian."""
        return _library().GaussianDpEvent(noise_multiplier)


_SAMPLINGS = {
    cls.__name__: cls for cls in (PoissonSampling, TruncatedPoissonSampling, EpochSampling)
}
Entry = tuple[Sampling, float, int]  # how, noise multiplier, how often


class PrivacyAccountant:
    """What a run has released, and the ε of it.

    The account only grows. Releases are kept by *run*, the releases of one accountant between two
    loads: loading a checkpoint adds the runs that are not known yet, and those that went further
    than known, so that nothing that was released is forgotten or counted twice, in whatever order
    runs were continued.

    Args:
        sampling: How the samples are drawn; decides what a release costs. One release is one
            optimizer step, or one epoch with `EpochSampling`. Must be set before the first release.
        method: `"pld"`, privacy loss distributions (tight), or `"rdp"`, Rényi divergences
            (looser).

    Raises:
        ValueError: The method is unknown.

    Example:
        >>> accountant = PrivacyAccountant(PoissonSampling(256 / 60000))
        >>> accountant.release(1.1, times=3525)
        >>> round(accountant.epsilon(1e-5), 4)
        1.1354
    """

    def __init__(self, sampling: Sampling | None = None, method: str = "pld") -> None:
        require_choice("method", method, METHODS)
        self.sampling, self.method = sampling, method
        self._runs: dict[str, list[Entry]] = {}
        self._run: str | None = None  # the one that goes on; named at its first release
        self._paid = 0  # steps of the epoch that were accounted with its first one
        self._known: tuple[Any, ...] | None = None
        self._composed: tuple[str, list[Entry], Any] | None = None

    @property
    def history(self) -> list[Entry]:
        """The account: `(sampling, noise multiplier, releases)` of all runs, in their order.

        Neighbours of equal sampling and noise are merged, so that they are composed at once.
        """
        history: list[Entry] = []
        for entries in self._runs.values():
            for sampling, sigma, count in entries:
                _append(history, sampling, sigma, count)
        return history

    def start_run(self, name: str | None = None) -> None:
        """What is released from now on belongs to a run of its own.

        Args:
            name: Must be unique, and the same in all processes of a run. Default: drawn at random.
        """
        self._run, self._paid = name, 0

    def start_epoch(self) -> None:
        """The samples are drawn anew: with `EpochSampling` the next step is another release."""
        self._paid = 0

    @property
    def next_step_costs(self) -> bool:
        """Whether the next step is a release, and not one of an epoch that is paid for."""
        return not (isinstance(self.sampling, EpochSampling) and self._paid)

    def step(self, noise_multiplier: float) -> None:
        """Account for one optimizer step.

        With `EpochSampling` only the first step of an epoch is a release, as long as σ stays the
        same: each sample takes part in one step of the epoch, whichever it is.

        Args:
            noise_multiplier: σ of the step.

        Raises:
            RuntimeError: `sampling` is not set.
            ValueError: σ is neither 0 nor at least `LEAST_NOISE`.
        """
        require_accountable(noise_multiplier)
        if isinstance(self.sampling, EpochSampling):
            entries = self._runs.get(self._run or "", [])
            # Another σ within an epoch is another release: which samples had which noise is not
            # known here.
            if self._paid and entries and entries[-1][:2] == (self.sampling, noise_multiplier):
                self._paid -= 1
                return
            # This step pays for the rest of the epoch: a sample is in one of its steps at most.
            self._paid = self.sampling.steps_per_epoch - 1
        self.release(noise_multiplier)

    def release(self, noise_multiplier: float, times: int = 1) -> None:
        """Account for equal releases.

        Args:
            noise_multiplier: σ of each.
            times: How many.

        Raises:
            RuntimeError: `sampling` is not set.
            ValueError: σ is neither 0 nor at least `LEAST_NOISE`.
        """
        require_accountable(noise_multiplier)
        if self.sampling is None:
            raise RuntimeError(
                "`accountant.sampling` must be set before the first step, found None."
            )
        # At random: checkpoints of several runs may come together in one account.
        self._run = self._run or secrets.token_hex(8)
        _append(self._runs.setdefault(self._run, []), self.sampling, noise_multiplier, times)

    def epsilon(self, delta: float) -> float:
        """The ε of everything that was released.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε at δ; 0 before the first release, infinite if anything was released without noise, or
            by an older version with less than `LEAST_NOISE`.

        Raises:
            ValueError: δ is out of range, or releases of two notions of neighbours come together.
        """
        history = self.history
        key = (*history, delta)
        # Callbacks ask again and again: the last answer is kept until something more is released.
        if self._known is None or self._known[0] != key:
            self._known = key, epsilon_of(history, delta, self.method, _INTERVAL)
        return float(self._known[1])

    def releases_left(
        self, epsilon: float, delta: float, noise_multiplier: float, at_most: float = 10**6
    ) -> int:
        """How many more releases of one kind a budget allows.

        Args:
            epsilon: ε, the budget of everything that was and will be released.
            delta: δ in (0, 1).
            noise_multiplier: σ of the coming releases.
            at_most: No more than these are asked for, nor more than 10⁶.

        Returns:
            The largest number of releases that keep ε at or below the budget, from above: by an
            accountant that overestimates ε a little.

        Raises:
            RuntimeError: `sampling` is not set.
            ValueError: δ is out of range, or releases of two notions of neighbours come together.
        """
        _require_delta(delta)
        if self.sampling is None:
            raise RuntimeError(
                "`accountant.sampling` must be set before it is asked for releases, found None."
            )
        history = self.history
        # Nearly without noise nothing is left of any budget: nothing to ask the library.
        if noise_multiplier < LEAST_NOISE or _has_no_noise(history):
            return 0
        spent = self._compose(history, self.sampling)
        event = self.sampling.event(noise_multiplier)

        def fits(count: int) -> bool:
            # Composing changes an accountant, and the history takes long to compose anew.
            trial = copy.deepcopy(spent)
            if count:
                trial.compose(event, count)
            return float(trial.get_epsilon(delta)) <= epsilon

        limit = int(min(at_most, 10**6))
        # Upwards from 1, then bisection: an ε far above the budget takes long to evaluate.
        low, high = 0, 1
        while high < limit and fits(high):
            low, high = high, min(2 * high, limit)
        if high == limit and fits(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _compose(self, history: list[Entry], sampling: Sampling) -> Any:
        """A coarse accountant of the library with all of the history.

        It is the one of last time, to which only what came since is added.
        """
        spent: Any = None
        new: list[Entry] | None = None
        if self._composed is not None and self._composed[0] == sampling.relation:
            _, earlier, spent = self._composed
            new = _entries_after(history, earlier)
        # An exception below would leave an accountant that knows a part of the entries.
        self._composed = None
        if new is None:
            relations = {how.relation for how in (sampling, *(how for how, _, _ in history))}
            spent, new = _accountant(relations, self.method, _COARSE), history
        for how, sigma, count in new:
            spent.compose(how.event(sigma), count)
        self._composed = sampling.relation, history, spent
        return spent

    def state_dict(self) -> dict[str, Any]:
        """The account for a checkpoint.

        Returns:
            The releases of all runs, by the name of the run, in plain types.
        """
        plain_runs = {name: _plain(entries) for name, entries in self._runs.items()}
        return {"runs": plain_runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what is not known yet.

        What comes next is a run of its own, accounted with this accountant's sampling.

        Args:
            state: What `state_dict` returned.
        """
        # Older versions kept one list.
        runs = state["runs"] if "runs" in state else {"": state["history"]}
        for name, entries in runs.items():
            # A run only grows: of two records of one run the longer one holds the other.
            if _length(entries) > _length(self._runs.get(name, ())):
                self._runs[name] = [
                    (_SAMPLINGS[kind](**args), sigma, count) for kind, args, sigma, count in entries
                ]
        self.start_run()

    def lacks(self, other: PrivacyAccountant) -> bool:
        """Whether another accountant knows of releases that are not in this account.

        Args:
            other: The other accountant.

        Returns:
            True if `load_state_dict` of its state would add something.
        """
        return any(
            _length(entries) > _length(self._runs.get(name, ()))
            for name, entries in other._runs.items()
        )

    def share_with(self, other: PrivacyAccountant) -> None:
        """Keep one account with another accountant: what either is told of, both know.

        What each of them knows already is in it. They differ in their sampling and method alone.

        Args:
            other: The other accountant.

        Example:
            >>> yours, ours = PrivacyAccountant(), PrivacyAccountant(PoissonSampling(0.1))
            >>> ours.share_with(yours)
            >>> ours.step(noise_multiplier=1.0)
            >>> yours.history == ours.history
            True
        """
        self.load_state_dict(other.state_dict())
        other._runs = self._runs
        # Each releases in runs of its own.
        other.start_run()

    def __getstate__(self) -> dict[str, Any]:
        # A copy goes on as a run of its own: else two runs would share a name, and of two runs of
        # one name only the longer one is kept.
        runs = {name: list(entries) for name, entries in self._runs.items()}
        return {**self.__dict__, "_runs": runs, "_run": None, "_composed": None}


def _append(entries: list[Entry], sampling: Sampling, sigma: float, count: int) -> None:
    """Add releases to the last entry if they are of its kind, else as a new one."""
    if entries and entries[-1][:2] == (sampling, sigma):
        _, _, before = entries.pop()
        count += before
    entries.append((sampling, sigma, count))


def _has_no_noise(history: Iterable[Entry]) -> bool:
    """Whether something was released with so little noise that ε is given as infinite."""
    return any(sigma < LEAST_NOISE for _, sigma, _ in history)


def require_accountable(noise_multiplier: float) -> None:
    """Refuse noise of which no account can be kept; none at all is allowed, for tests.

    Args:
        noise_multiplier: σ of a release.

    Raises:
        ValueError: σ is neither 0 nor at least `LEAST_NOISE`.
    """
    if 0 < noise_multiplier < LEAST_NOISE:
        raise ValueError(
            f"`noise_multiplier` must be at least {LEAST_NOISE} where an account is kept, or 0, "
            f"whose ε is infinite, found {noise_multiplier:g}: of less noise a single release may "
            "cost an ε of thousands, which protects nobody. Use more, or let `epsilon=` of "
            "PrivacyCallback find out how much."
        )


def _length(entries: Iterable[tuple[Any, ...]]) -> int:
    """The number of releases."""
    return sum(entry[-1] for entry in entries)


def _plain(entries: list[Entry]) -> list[tuple[Any, ...]]:
    return [
        (type(sampling).__name__, asdict(sampling), sigma, count)
        for sampling, sigma, count in entries
    ]


def _entries_after(history: list[Entry], earlier: list[Entry]) -> list[Entry] | None:
    """What came to a history since an earlier one; `None` if it does not go on from there.

    The last entry of the earlier one may have grown, as equal releases are merged.
    """
    if not earlier:
        return history
    last = len(earlier) - 1
    sampling, sigma, count_before = earlier[last]
    if history[:last] != earlier[:last] or len(history) <= last:
        return None
    *kind, count_now = history[last]
    if kind != [sampling, sigma] or count_now < count_before:
        return None
    grown = [(sampling, sigma, count_now - count_before)] if count_now > count_before else []
    return [*grown, *history[last + 1 :]]


def epsilon_of(
    history: list[Entry], delta: float, method: str = "pld", interval: float = _INTERVAL
) -> float:
    """The ε of a history at δ, with the privacy loss in steps of `interval`."""
    _require_delta(delta)
    if not history:
        return 0.0
    if _has_no_noise(history):
        return float("inf")
    accountant = _accountant({sampling.relation for sampling, _, _ in history}, method, interval)
    for sampling, sigma, count in history:
        accountant.compose(sampling.event(sigma), count)
    return float(accountant.get_epsilon(delta))


def calibrated_noise(
    epsilon: float,
    delta: float,
    sampling: Sampling,
    releases: int,
    method: str = "pld",
    schedule: Schedule | None = None,
) -> float:
    """The smallest noise multiplier with which `releases` releases cost no more than `epsilon`.

    Args:
        epsilon: ε > 0.
        delta: δ in (0, 1).
        sampling: How the samples are drawn.
        releases: Optimizer steps, or epochs with `EpochSampling`.
        method: `"pld"` or `"rdp"`.
        schedule: The noise multiplier of a release is the result times this function of the
            release's number.

    Returns:
        σ, to about 10⁻⁴.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> sigma = calibrated_noise(3.0, 1e-5, PoissonSampling(256 / 60000), 3525)
        >>> 0.725 < sigma < 0.735
        True
    """
    require_positive("epsilon", epsilon)
    _require_delta(delta)
    require_choice("method", method, METHODS)
    da = _library()
    runs = [(1.0, releases)] if schedule is None else runs_of(schedule, releases)

    def whole_run(sigma: float) -> Any:
        return da.ComposedDpEvent(
            [da.SelfComposedDpEvent(sampling.event(sigma * share), count) for share, count in runs]
        )

    noise_multiplier = da.calibrate_dp_mechanism(
        # Coarse is safe: it overestimates ε, so that σ comes out a little larger.
        lambda: _accountant({sampling.relation}, method, _COARSE),
        whole_run,
        epsilon,
        delta,
        bracket_interval=da.LowerEndpointAndGuess(0, 1.0),
        tol=1e-4,
    )
    return float(noise_multiplier)


def _accountant(relations: set[str], method: str, interval: float) -> Any:
    """An accountant of the library, of which nothing is released yet."""
    da = _library()
    # An ε for one notion of neighbours says nothing for the other: they do not add up.
    if len(relations) > 1:
        notions = " and ".join(f"{name} ({NEIGHBOURS[name]})" for name in sorted(relations))
        raise ValueError(
            "Expected one notion of neighbouring data sets in a history, found "
            f"{notions}: Poisson sampling and samplings of fixed or largest sizes cannot be added "
            "up. Keep `sampling=` as it was when the run began."
        )
    relation = da.NeighboringRelation[relations.pop()]
    if method == "pld":
        return da.pld.PLDAccountant(relation, value_discretization_interval=interval)
    if relation.name == "REPLACE_SPECIAL":
        raise ValueError("Truncated Poisson sampling is accounted by `method='pld'`, found 'rdp'.")
    return da.rdp.RdpAccountant(neighboring_relation=relation)


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(
            f"`delta` must lie in (0, 1), well below 1 / data set size, found {delta}."
        )


def _library() -> Any:
    """The library, which is imported where something is accounted: it takes a second."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs `dp-accounting`, which is not installed: "
            "`pip install lightning-curv[privacy]`."
        ) from error
    return dp_accounting
