"""The front: the process that carries visitors' requests to ports inside sandboxes.

::

    visitor ──HTTP/1.1──► front ──HTTP/1.1──► program in a sandbox
                            │ which sandbox, and may they?     rows
                            └ a connection to that port        host agent, which has no further part

It runs tenants' traffic and nothing of the console's: no pages, no sessions. Everything that a
visitor or a program sends is parsed (h11) and written anew, so that both sides always agree where a
message ends. What passes is held one piece at a time, and a side that doesn't read stops the other.

``front``       accepts connections, within limits, and ends those of sandboxes that have ended
``visits``      one visitor's connection: requests, one after the other, and their answers
``entry``       whether a visitor may come in: the token, the cookie, and requests of other pages
``exchange``    one request to a program, and its response
``headers``     what is passed on of either's headers
``answers``     what the front says itself
``wire``        a socket and its HTTP
"""
