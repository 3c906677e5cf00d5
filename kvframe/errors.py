"""Every error kvframe raises on purpose. Each says what was expected, what came, and the way out."""


class KvframeError(Exception):
    """Base of all errors raised by kvframe."""


class ConfigError(KvframeError, ValueError):
    """A stage, policy or call was given a value it cannot work with."""


class SlotError(ConfigError):
    """A stage was put into a slot it does not belong to."""


class UnknownNameError(KvframeError, LookupError):
    """No stage, policy or plugin has this name."""


class UnsupportedModelError(KvframeError, NotImplementedError):
    """The model does something that a retrieval cache does not serve."""


class UnsupportedCallError(KvframeError, NotImplementedError):
    """The call asks for something that a retrieval cache does not serve."""


class NotAttachedError(KvframeError, RuntimeError):
    """The cache was used by a model whose attention does not reach kvframe."""


class CacheMismatchError(KvframeError, ValueError):
    """The cache belongs to another model or to another batch."""


class PaddingError(KvframeError, ValueError):
    """The attention mask is not left padding."""


class HostMemoryError(KvframeError, MemoryError):
    """The host cannot hold the KV of the asked context."""


class DeviceMemoryError(KvframeError, MemoryError):
    """The device cannot hold what a policy keeps there for the asked context."""


class NonFiniteError(KvframeError, ArithmeticError):
    """Keys or values contain NaN or infinity."""


class StudyFileError(KvframeError):
    """A study file raises an error, or defines no study."""


class ResultsFileError(KvframeError, OSError):
    """A study's results cannot be read or written."""


class PluginError(KvframeError):
    """A plugin is at fault."""


class PluginLoadError(PluginError, ImportError):
    """A plugin failed to import."""


class PluginConflictError(PluginError):
    """Two distributions claim one plugin name."""


class NameConflictError(PluginError):
    """Two plugins register one name."""


class PluginVersionError(PluginError):
    """A plugin was written for another version of the plugin API."""
