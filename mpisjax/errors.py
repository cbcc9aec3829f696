"""The one exception for mistakes a user can make and mend."""


class UserError(ValueError):
    """A mistake in a setting, a file or an argument, told in one sentence that says what to do."""
