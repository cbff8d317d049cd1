"""The thirty-five problem families of `mini`, five in each of MATH's seven subjects."""

from lib.mini import algebra, counting, geometry, intermediate_algebra, number_theory, prealgebra, precalculus

FAMILIES = (
    *algebra.FAMILIES,
    *counting.FAMILIES,
    *geometry.FAMILIES,
    *intermediate_algebra.FAMILIES,
    *number_theory.FAMILIES,
    *prealgebra.FAMILIES,
    *precalculus.FAMILIES,
)
