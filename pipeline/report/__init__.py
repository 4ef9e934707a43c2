"""The pages: the report of a run, which shows whether the images became better or only the score did, and the audit
of its judge.

    choices.py      which images the report shows, by fixed rules
    pictures.py     image bytes -> pictures inside a page
    figures.py      numbers -> SVG
    words.py        numbers -> sentences
    view.py         all of these from the artifacts of a run -> the report
    audit_words.py  findings -> sentences
    audit.py        what was heard from a judge, and the findings -> the audit's page
    pages.py        a template and its values -> HTML; look.css.j2 and parts.html.j2 are common to both

A page is a pure function of what it is made from: no clock, no network, no scripts.
"""
