"""serve_config.yaml as the commands read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from deployments.settings import AppSettings, ModelAppSettings, Settings

SettingsT = TypeVar("SettingsT", bound="Settings")


def settings_from_yaml(path: Path) -> tuple[AppSettings, dict[str, ModelAppSettings]]:
    """The router's application, and the models that are applications of their own by the application's name."""
    import yaml

    from deployments.settings import AppSettings, ModelAppSettings
    from omnilmm.errors import ConfigError

    routers: list[AppSettings] = []
    hosted: dict[str, ModelAppSettings] = {}
    try:
        for application in yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]:
            if application["import_path"] == "deployments.app:build_model":
                hosted[application["name"]] = validated(ModelAppSettings, application["args"])
            else:
                routers.append(validated(AppSettings, application["args"]))
        (router,) = routers
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(f"{path} must hold one application of deployments.app:build with args") from None
    return router, hosted


def validated(kind: type[SettingsT], args: dict[str, Any]) -> SettingsT:
    """The settings in `args`. Raises ConfigError: the first that is wrong, by its path."""
    from pydantic import ValidationError

    from omnilmm.errors import ConfigError

    try:
        return kind.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
