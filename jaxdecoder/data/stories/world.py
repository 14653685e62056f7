"""The world of the stories: everything, or a smaller one."""

from typing import NamedTuple

from jaxdecoder.config import DataConfig


class World(NamedTuple):
    """Which stories can be told."""

    plots: tuple[str, ...] = ()
    """Names of `PLOTS`; empty: all of them."""
    names: int = 0
    """How many names of girls, of boys and of each other sort there are; 0: all of them."""
    paragraphs: bool = True
    """Whether stories have several paragraphs."""


EVERYTHING = World()


def world_of(data: DataConfig) -> World:
    """Return the world of a config's stories."""
    return World(data.stories_plots, data.stories_names, data.stories_paragraphs)
