"""The environment that an image comes by: its base's, the host's, and what the recipe bakes."""

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
class Inherited:
    """What a build begins with.

    ``host`` is what every process of a container has, ``base`` what is baked into the base, and
    ``files`` is /etc/environment as the base and the host have it: what a step adds to that is its
    own.  ``template`` is laid over all of it.
    """

    host: Mapping[str, str]
    base: Mapping[str, str]
    files: str
    template: Mapping[str, str]

    def baked(self, file: str) -> Environment:
        """The image's environment with this /etc/environment: the base's, that, the template's."""
        own = recipe_variables(file, self.files, self.host)
        return merge_baked(merge_baked(self.base, own), self.template)

    def of_process(self, file: str, step: int) -> Environment:
        """What a process has with this /etc/environment, which ``step`` wrote (0 for none).

        Raises BuildFailed if no process can have it.
        """
        own = self.baked(file)
        found = resolve_environment(self.host, own)
        try:
            check_environment(own)
            check_variable_sizes(found)
        except InvalidRequest as error:
            raise environment_too_large(step, error.detail) from error
        return found
