"""Which deploys a controller refuses because another driver was faster; without Ray."""

from __future__ import annotations

import pytest

from rayserve_fast.controlplane.seen import OvertakenError
from rayserve_fast.controlplane.spec import ApplicationSpec, DeploymentConfig, DeploymentSpec, DriverEnv
from rayserve_fast.controlplane.state import Application
from rayserve_fast.controlplane.traffic import Traffic


def version(number: str, code: str = "first") -> ApplicationSpec:
    deployment = DeploymentSpec("v", "In", b"", DeploymentConfig(), DriverEnv(), False, None, code)
    return ApplicationSpec("v", None, "In", (deployment,), era="deploy", labels={"version": number})


@pytest.mark.parametrize(
    ("there", "seen", "taken"),
    [
        (None, None, True),
        (version("1"), {"version": "1"}, True),
        (None, {"version": "1"}, False),  # deleted meanwhile
        (version("1"), None, False),  # made meanwhile
        (version("2"), {"version": "1"}, False),
    ],
    ids=["none", "the same", "deleted", "made", "changed"],
)
def test_a_deploy_is_taken_if_what_it_replaces_is_what_was_seen(
    there: ApplicationSpec | None, seen: dict[str, str] | None, taken: bool
) -> None:
    apps = {} if there is None else {"v": Application(there, 0.0)}
    new = version("3", "second")
    if taken:
        Traffic().check_deploy([new], apps, {"v": seen})
    else:
        with pytest.raises(OvertakenError, match='changed the application "v" meanwhile'):
            Traffic().check_deploy([new], apps, {"v": seen})
    Traffic().check_deploy([new], apps)
    Traffic().check_deploy([new], apps, {"another": {}})


def test_what_is_being_deleted_is_seen_no_more() -> None:
    leaving = Application(version("1"), 0.0, deleting=True)
    Traffic().check_deploy([version("2", "second")], {"v": leaving}, {"v": None})


@pytest.mark.parametrize("seen", [None, {"version": "1"}])
def test_an_order_that_a_restarted_controller_gets_again_is_not_overtaken_by_itself(
    seen: dict[str, str] | None,
) -> None:
    apps = {"v": Application(version("2", "second"), 0.0)}
    Traffic().check_deploy([version("2", "second")], apps, {"v": seen})
