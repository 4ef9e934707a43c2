"""The report of a run: one HTML page that shows whether the images became better or only the score did.

    choices.py    which images are shown, by fixed rules
    pictures.py   image bytes -> pictures inside the page
    figures.py    numbers -> SVG
    words.py      numbers -> sentences
    view.py       all of these from the artifacts of a run -> the page

The page is a pure function of the artifacts and the stage's settings: no clock, no network, no scripts.
"""
