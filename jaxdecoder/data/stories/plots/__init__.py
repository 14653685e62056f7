"""All plots by name. A plot is a function that makes a `Teller` tell it."""

from collections.abc import Callable

from jaxdecoder.data.stories.plots.kindness import cloud, foundling, greedy, honest, quarrel, race
from jaxdecoder.data.stories.plots.trouble import garden, gift, lesson, lost, noise, repair, stuck
from jaxdecoder.data.stories.telling import Teller

# Their order matters: another order would give other stories for a seed.
PLOTS: dict[str, Callable[[Teller], None]] = {
    plot.__name__: plot
    for plot in (
        lost,
        stuck,
        gift,
        quarrel,
        noise,
        lesson,
        race,
        foundling,
        greedy,
        repair,
        garden,
        honest,
        cloud,
    )
}
