"""Errors of loading a model. They name the file and the property, so that the message alone says what to change."""


class UnsupportedModelError(ValueError):
    """The model is well formed, but of a kind that is not served."""


class WeightsError(ValueError):
    """A weights or config file is damaged, incomplete or contradicts itself."""


class DeviceError(ValueError):
    """The device that was asked for is not there, or cannot be used."""
