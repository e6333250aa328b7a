"""Nothing yet."""

VARIANTS = ()
