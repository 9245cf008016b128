"""The HTTP door: routes, bytes of bodies, replies, errors, and protection from web pages."""
