"""Intervals and tests over seeds and problems.

A run's answers are a row of cells, one a problem: the mean over its samples, so 0 or 1 with one sample. Runs of one
size, which differ in their seed, are an array (seeds, problems). Seeds and problems are both drawn from more of their
kind, and the interval of a value covers both (Searle, Casella and McCulloch, Variance Components, 1992):

    V = var_p / P + max(sum over sizes of (s^2 - w) / R, 0),      value +- t(0.975, v) sqrt(V)

var_p: variance over the P problems of the value's means over seeds, sampling of answers included; s^2: variance of
the accuracy between R seeds; w: what s^2 would be from problems and sampling alone (the interaction's mean square over
P); v: degrees of freedom by Satterthwaite, at least one, the seeds of both sizes pooled. `test_statistics.py` measures
the coverage.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy.stats import binomtest, norm, permutation_test, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

LEVEL = 0.05  # of every test; intervals are at 95 %
POWER = 0.80
MARGIN = 0.02  # a difference below two points of accuracy is none in practice
DIGITS = 12  # below these a number is rounding: means of thirds leave 4e-19 where 0 is meant


@dataclass(frozen=True)
class Estimate:
    """A value (a share or a difference of shares) with its 95 % interval.

    `error`: standard error; `freedom`: its degrees of freedom; `p`: two-sided, that the value is zero;
    `seed_share`: share of the variance that comes from seeds (NaN with one seed, which does not show it).
    """

    value: float
    low: float
    high: float
    error: float
    freedom: float
    p: float
    seed_share: float = np.nan

    @property
    def equivalent(self) -> bool:
        """Whether two one-sided tests at 5 % (TOST) place the value between -MARGIN and MARGIN."""
        return abs(self.value) + t.ppf(1 - LEVEL, self.freedom) * self.error < MARGIN

    @property
    def detectable(self) -> float:
        """The smallest true difference that a study with this error finds with a power of 80 %."""
        return (t.ppf(1 - LEVEL / 2, self.freedom) + t.ppf(POWER, self.freedom)) * self.error


def estimate(*arms: np.ndarray) -> Estimate:
    """The sum of the means of arms, (seeds, problems) each: a mean, or `second, -first` for a paired difference.

    Where one arm has a single seed, its variance of training is taken from the other. Such intervals are too short more
    often: of 500 simulated ones, two seeds against one on 5,000 problems, 90 to 94 % held the truth.
    """
    problems = arms[0].shape[1]
    by_problem = sum(arm.mean(axis=0) for arm in arms)  # (P,)
    value = round(float(by_problem.mean()), DIGITS)
    if problems == 1:  # it says next to nothing
        return Estimate(value, value - 1, value + 1, 1 / float(norm.ppf(1 - LEVEL / 2)), np.inf, 1.0)
    problem_part = by_problem.var(ddof=1) / problems
    spreads = [spread_of_seeds(arm) for arm in arms if len(arm) > 1]
    between, within = np.mean(spreads, axis=0) if spreads else (0.0, 0.0)
    both = [spread_of_seeds(arm) if len(arm) > 1 else (between, within) for arm in arms]
    observed, expected = (sum(pair[i] / len(arm) for pair, arm in zip(both, arms, strict=True)) for i in (0, 1))
    seed_part = max(observed - expected, 0.0)
    variance = problem_part + seed_part
    if variance < 10.0**-DIGITS / problems:
        # No two problems differ: what occurred in none of n occurs in at most 3.7 / n of all (Clopper and Pearson).
        reach = round(float(proportion_confint(0, problems, method="beta")[1]), DIGITS)
        error = reach / float(norm.ppf(1 - LEVEL / 2))
        p = float(2 * norm.sf(abs(value) / error))
        return Estimate(value, value - reach, value + reach, error, np.inf, p)
    freedom_of_seeds = sum(len(arm) - 1 for arm in arms)
    uncertain = problem_part**2 / (problems - 1) + (observed**2 / freedom_of_seeds if spreads else 0.0)
    # At least one: what is cut at 0 in `variance` counts in `uncertain` whole.
    freedom, error = max(variance**2 / uncertain, 1.0), float(np.sqrt(variance))
    reach = float(t.ppf(1 - LEVEL / 2, freedom)) * error
    low, high = round(value - reach, DIGITS), round(value + reach, DIGITS)
    p = 2 * t.sf(abs(value) / error, freedom)
    return Estimate(value, low, high, error, freedom, float(p), seed_part / variance if spreads else np.nan)


def spread_of_seeds(arm: np.ndarray) -> tuple[float, float]:
    """s^2 and w of the module's text for one size (seeds, problems)."""
    seeds, problems = arm.shape
    means = arm.mean(axis=1)
    rest = arm - means[:, None] - arm.mean(axis=0) + arm.mean()
    return float(means.var(ddof=1)), float((rest**2).sum() / ((seeds - 1) * (problems - 1)) / problems)


def mean_share(cells: np.ndarray) -> Estimate:
    """A share (seeds, problems) with Wilson's interval, whose n is the size of the simple sample that has the same
    variance (Dean and Pagano, 2015)."""
    found, (seeds, problems) = estimate(cells), cells.shape
    spread = found.value * (1 - found.value)
    size = spread / found.error**2 if spread else problems
    size, freedom = (size, found.freedom) if seeds > 1 else (max(size, problems), np.inf)
    low, high = wilson(found.value, size, freedom)
    return replace(found, low=low, high=high)


def wilson(share: float, n: float, freedom: float = np.inf) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson's score), with the quantile of t for few degrees of freedom."""
    alpha = 2 * norm.sf(t.ppf(1 - LEVEL / 2, freedom))
    low, high = proportion_confint(share * n, n, alpha=alpha, method="wilson")
    return round(float(low), DIGITS), round(float(high), DIGITS)


def paired_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Second minus first, both (seeds, problems). With one seed each an exact test decides, and the interval is widened
    to zero where the test does not refuse zero."""
    found = estimate(second, -first)
    if len(first) > 1 or len(second) > 1:
        return found
    p = exact_test(first[0], second[0])
    low, high = (min(found.low, 0.0), max(found.high, 0.0)) if p >= LEVEL else (found.low, found.high)
    return replace(found, p=p, low=low, high=high)


def exact_test(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of two runs on the same problems (P,): exact McNemar's where a cell is one answer; otherwise every
    problem's difference changes its sign by chance (10,000 times, or all cases where they are fewer)."""
    differences = np.round((second - first)[second != first], DIGITS)
    if len(differences) < 2:  # one sign is as likely as the other
        return 1.0
    if set(np.abs(differences)) == {1.0}:
        return float(binomtest(int((differences > 0).sum()), len(differences), 0.5).pvalue)
    options = {"permutation_type": "samples", "n_resamples": 10_000, "batch": 1000, "vectorized": True}
    return float(permutation_test((differences,), np.sum, rng=np.random.default_rng(0), **options).pvalue)


def split(first: tuple, second: tuple) -> tuple[Estimate, Estimate]:
    """The parts of an accuracy difference that come from form and from correctness within it.

    `first` and `second`: cells of format and of correct of a size, each (seeds, problems).
    accuracy = P(form) P(correct | form), and the change of a product is the change of each factor times the mean of the
    other (Shapley's split). Intervals by the delta method: the slopes along the four means make cells with this sum.
    """
    means = [(form.mean(), right.mean()) for form, right in (first, second)]
    shares = [right / form if form else None for form, right in means]
    # Where no answer has the form, nothing is known of those within it: as the other size's.
    given = [own if own is not None else other or 0.0 for own, other in zip(shares, shares[::-1], strict=True)]
    change = means[1][0] - means[0][0]
    by_form, whole = [], []
    for sign, (form, right), (form_mean, _), ratio in zip((-1, 1), (first, second), means, given, strict=True):
        slope = change / (2 * form_mean) if form_mean else 0.0  # of the part of form, along this size's P(correct)
        by_form.append(slope * right + (sign * sum(given) / 2 - slope * ratio) * form)
        whole.append(sign * right)
    rest = [cells - part for cells, part in zip(whole, by_form, strict=True)]
    return estimate(*by_form), estimate(*rest)


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for the number of comparisons in a family (Holm, 1979)."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def trend(cells: pd.DataFrame) -> Estimate | None:
    """Logarithm of the factor by which a doubling of n multiplies the odds of a right answer; None where no model fits.

    `cells`: columns n, run, problem, correct (a share). Logistic regression on log2 n over all sizes; errors clustered
    by run and by problem (Cameron, Gelbach and Miller, 2011), t with the number of runs minus 2. With few runs this
    variance may come out too small, or negative: it counts for no less than with clusters of one kind alone.
    """
    runs = cells["run"].nunique()
    few = cells["n"].nunique() < 3 or runs < 4 or cells["problem"].nunique() < 2
    right, wrong = cells["n"][cells["correct"] > 0], cells["n"][cells["correct"] < 1]
    # With right answers on one side of some n alone, the likelihood has no maximum.
    if few or right.empty or wrong.empty or right.min() >= wrong.max() or right.max() <= wrong.min():
        return None
    groups = cells[["run", "problem"]].apply(lambda names: pd.factorize(names)[0]).to_numpy()
    design = sm.add_constant(np.log2(cells["n"].to_numpy(float)))
    fit = sm.GLM(cells["correct"].to_numpy(), design, family=sm.families.Binomial()).fit()
    variances = [covariance[1, 1] for covariance in cov_cluster_2groups(fit, groups)]  # of both kinds, of each alone
    value, error = float(fit.params[1]), float(np.sqrt(max(variances)))
    reach = t.ppf(1 - LEVEL / 2, runs - 2) * error
    return Estimate(value, value - reach, value + reach, error, runs - 2, float(2 * t.sf(abs(value) / error, runs - 2)))
