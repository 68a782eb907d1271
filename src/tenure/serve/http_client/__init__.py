"""The parts of the HTTP and shared-memory transport (`transports/http`): connections, answers, v2 bodies, regions.

blocking ┐ sockets of threads             v2json: request heads, answers' layouts
streaming┘ … of an event loop             shared: when and how inputs go by shared memory
response   reads an answer, for both      regions: the memory itself
"""
