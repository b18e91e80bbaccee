"""The API's description in OpenAPI 3.1, made from the addresses, the specs and the error tree.

:mod:`calls` reads the table of addresses, :mod:`schemas` what is sent and answered, :mod:`refusals`
the errors, :mod:`samples` has the examples, and :mod:`document` puts them together. What a call
takes and answers is said above its view (:mod:`orkestr_console.http.describing`).
"""
