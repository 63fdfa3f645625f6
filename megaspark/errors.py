"""The one exception that means "the user can mend this": printed as a single line, exit status 2."""


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and the nearest right thing."""
