"""The demo: the chapter on kernel regression, a year of flights, and a map in two features, as figures and a page."""
