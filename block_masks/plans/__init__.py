"""Where packed rows and slots lie."""
