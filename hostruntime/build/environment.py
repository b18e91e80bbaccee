"""The environment of a build, from the host, the base, the recipe and the template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hostruntime.build.report import environment_too_large
from hostruntime.errors import InvalidRequest
from hostruntime.image.environment import (
    Environment,
    check_environment,
    check_variable_sizes,
    merge_baked,
    recipe_variables,
    resolve_environment,
)


@dataclass(frozen=True)
class BuildEnvironment:
    """The variables a build starts with.

    ``host`` is set for every process of a container, ``base`` is baked into the base image, and
    ``initial_file`` is /etc/environment before the first step; what steps add to it is baked into
    the image. ``template`` overrides all of it.
    """

    host: Mapping[str, str]
    base: Mapping[str, str]
    initial_file: str
    template: Mapping[str, str]

    def image_environment(self, file: str) -> Environment:
        """Return the environment to bake into the image, given its /etc/environment."""
        own = recipe_variables(file, self.initial_file, self.host)
        return merge_baked(merge_baked(self.base, own), self.template)

    def process_environment(self, file: str, step: int) -> Environment:
        """Return a process's environment, given an /etc/environment that ``step`` wrote (or 0).

        Raises BuildFailed if it is too large for a process.
        """
        own = self.image_environment(file)
        result = resolve_environment(self.host, own)
        try:
            check_environment(own)
            check_variable_sizes(result)
        except InvalidRequest as error:
            raise environment_too_large(step, error.detail) from error
        return result
