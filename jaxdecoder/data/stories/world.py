"""Which stories there are to tell: all of them, or those of a smaller world."""

from typing import NamedTuple

from jaxdecoder.config import DataConfig


class World(NamedTuple):
    """Which stories there are to tell."""

    plots: tuple[str, ...] = ()
    """Names of `PLOTS`; empty: all of them."""
    names: int = 0
    """So many names each of girls, boys and others are given; 0: all of them."""
    paragraphs: bool = True
    """Whether stories have several."""


EVERYTHING = World()


def world_of(data: DataConfig) -> World:
    """The world that a config's stories are from."""
    return World(data.stories_plots, data.stories_names, data.stories_paragraphs)
