"""All processes share one environment, so each must know every other's variables."""

from decode_svc.settings import DecodeSettings
from gateway.settings import GatewaySettings
from prefill_svc.settings import PrefillSettings
from tandem.config import KNOWN_VARIABLES, OTHER_VARIABLES, settings_of


def test_the_known_variables_are_those_of_all_settings_classes() -> None:
    classes = (GatewaySettings, PrefillSettings, DecodeSettings)
    assert {setting.variable for cls in classes for setting in settings_of(cls)} | OTHER_VARIABLES == KNOWN_VARIABLES
