"""The demo: the chapter on kernel regression, then a year of flights, as figures and a page."""
