-- A ledger of schema 0001 as the last Tenure that made such ones wrote it. Never changed again.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	at_s FLOAT NOT NULL, 
	kind VARCHAR(64) NOT NULL, 
	who VARCHAR(128) NOT NULL, 
	why TEXT NOT NULL, 
	run_id VARCHAR(128) NOT NULL, 
	stage VARCHAR(128) NOT NULL, 
	lease_id VARCHAR(128) NOT NULL, 
	node VARCHAR(128) NOT NULL, 
	data TEXT NOT NULL
);
INSERT INTO "events" VALUES(1,1000000.0,'broker.started','broker','','','','','','{"fence":1,"pid":17393}');
INSERT INTO "events" VALUES(2,1000000.0,'node.up','agent:a','','','','','a','{"node":{"name":"a","capacity":{"cpus":4.0,"memory_bytes":1073741824,"disk_bytes":0,"gpus":[]},"machine":{"cpu_model":"fake","cpu_features":[],"cores":1,"memory_bytes":0,"gpu_model":"","gpus":0,"kernel":"","python":""},"runtimes":["process"],"bounds":{},"confinement":{},"state":"up","term_s":60.0}}');
INSERT INTO "events" VALUES(3,1000000.0,'node.up','agent:b','','','','','b','{"node":{"name":"b","capacity":{"cpus":4.0,"memory_bytes":1073741824,"disk_bytes":0,"gpus":[]},"machine":{"cpu_model":"fake","cpu_features":[],"cores":1,"memory_bytes":0,"gpu_model":"","gpus":0,"kernel":"","python":""},"runtimes":["process"],"bounds":{},"confinement":{},"state":"up","term_s":60.0}}');
INSERT INTO "events" VALUES(4,1000000.0,'run.pending','tenant:default','released','r','','','','{}');
INSERT INTO "events" VALUES(5,1000000.0,'lease.requested','tenant:default','0.5 cpus, 64.0 MiB, slot 100s of 1000s','r','t','l1','','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"requested","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000000.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(6,1000000.0,'lease.granting','broker','placed on a','r','t','l1','a','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"granting","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(7,1000000.0,'lease.active','agent:a','','r','t','l1','a','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(8,1000000.0,'lease.started','agent:a','','r','t','l1','a','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"attempt":1,"pid":1000}');
INSERT INTO "events" VALUES(9,1000000.0,'lease.exited','agent:a','completed','r','t','l1','a','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"attempt":1,"kind":"completed","code":0,"signal":0}');
INSERT INTO "events" VALUES(10,1000000.0,'lease.ended','agent:a','completed','r','t','l1','a','{"lease":{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"ended","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":1000000.0,"end_reason":"completed","end_detail":"completed"}}');
INSERT INTO "events" VALUES(11,1000000.0,'lease.requested','tenant:default','0.5 cpus, 700.0 MiB, slot 5000s of 50000s','r','s','l2','','{"lease":{"id":"l2","run_id":"r","stage":"s","worker":0,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"requested","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000000.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(12,1000000.0,'lease.requested','tenant:default','0.5 cpus, 700.0 MiB, slot 5000s of 50000s','r','s','l3','','{"lease":{"id":"l3","run_id":"r","stage":"s","worker":1,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"requested","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000000.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(13,1000000.0,'lease.granting','broker','placed on a','r','s','l2','a','{"lease":{"id":"l2","run_id":"r","stage":"s","worker":0,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"granting","attempt":1,"node":"a","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(14,1000000.0,'lease.granting','broker','placed on b','r','s','l3','b','{"lease":{"id":"l3","run_id":"r","stage":"s","worker":1,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"granting","attempt":1,"node":"b","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(15,1000000.0,'lease.active','agent:a','','r','s','l2','a','{"lease":{"id":"l2","run_id":"r","stage":"s","worker":0,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(16,1000000.0,'lease.started','agent:a','','r','s','l2','a','{"lease":{"id":"l2","run_id":"r","stage":"s","worker":0,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"attempt":1,"pid":1001}');
INSERT INTO "events" VALUES(17,1000000.0,'lease.active','agent:b','','r','s','l3','b','{"lease":{"id":"l3","run_id":"r","stage":"s","worker":1,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"b","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(18,1000000.0,'lease.started','agent:b','','r','s','l3','b','{"lease":{"id":"l3","run_id":"r","stage":"s","worker":1,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"b","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"attempt":1,"pid":1002}');
INSERT INTO "events" VALUES(19,1000000.0,'lease.requested','tenant:default','0.5 cpus, 64.0 MiB, slot 5000s of 50000s','r','e','l4','','{"lease":{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"requested","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000000.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(20,1000000.0,'lease.granting','broker','placed on a','r','e','l4','a','{"lease":{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"granting","attempt":0,"node":"a","devices":[],"fence":4,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(21,1000000.0,'lease.active','broker','holds its envelope and waits for events','r','e','l4','a','{"lease":{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":0,"node":"a","devices":[],"fence":4,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(22,1000001.0,'invoked','broker','event one','r','e','l4','a','{"lease":{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":4,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005001.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"event":"one","attempt":1,"start":1}');
INSERT INTO "events" VALUES(23,1000001.0,'lease.started','agent:a','','r','e','l4','a','{"lease":{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":4,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005001.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""},"attempt":1,"pid":1003}');
INSERT INTO "events" VALUES(24,1000002.0,'lease.requested','tenant:default','0.5 cpus, 900.0 MiB, slot 100s of 1000s','r','w','l5','','{"lease":{"id":"l5","run_id":"r","stage":"w","worker":0,"gang_id":"waits","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":943718400,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"requested","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000002.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(25,1000002.0,'lease.queued','broker','waits for room: a: needs 900.0 MiB of memory; node has 260.0 MiB free; b: needs 900.0 MiB of memory; node has 324.0 MiB free','r','w','l5','','{"lease":{"id":"l5","run_id":"r","stage":"w","worker":0,"gang_id":"waits","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":943718400,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"queued","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000002.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}}');
INSERT INTO "events" VALUES(26,1000002.0,'trial.recorded','broker','','r','s','','','{"trial":"t1","source":"probe","fingerprint":"f"}');
CREATE TABLE exits (
	lease_id VARCHAR(128) NOT NULL, 
	attempt INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	ended_at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (lease_id, attempt)
);
INSERT INTO "exits" VALUES('l1',1,'completed',1.0,'{"kind":"completed","code":0,"signal":0,"witness":"","started_at_s":0.0,"ended_at_s":1.0,"usage":null,"result":null,"log_tail":""}');
CREATE TABLE invocations (
	run_id VARCHAR(128) NOT NULL, 
	stage VARCHAR(128) NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	worker INTEGER NOT NULL, 
	lease_id VARCHAR(128) NOT NULL, 
	attempt INTEGER NOT NULL, 
	starts INTEGER NOT NULL, 
	failures INTEGER NOT NULL, 
	done INTEGER NOT NULL, 
	at_s FLOAT NOT NULL, 
	PRIMARY KEY (run_id, stage, name)
);
INSERT INTO "invocations" VALUES('r','e','one',0,'l4',1,1,0,0,1000001.0);
CREATE TABLE leases (
	id VARCHAR(128) NOT NULL, 
	gang_id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(128) NOT NULL, 
	stage VARCHAR(128) NOT NULL, 
	worker INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	tenant VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	node VARCHAR(128) NOT NULL, 
	fence INTEGER NOT NULL, 
	requested_at_s FLOAT NOT NULL, 
	queue_until_s FLOAT NOT NULL, 
	ended_at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "leases" VALUES('l1','ended','r','t',0,1,'default','ended','a',2,1000000.0,1000060.0,1000000.0,'{"id":"l1","run_id":"r","stage":"t","worker":0,"gang_id":"ended","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"ended","attempt":1,"node":"a","devices":[],"fence":2,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1000100.0,"total_ends_at_s":1001000.0,"ended_at_s":1000000.0,"end_reason":"completed","end_detail":"completed"}');
INSERT INTO "leases" VALUES('l2','live','r','s',0,1,'default','active','a',3,1000000.0,1000060.0,0.0,'{"id":"l2","run_id":"r","stage":"s","worker":0,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}');
INSERT INTO "leases" VALUES('l3','live','r','s',1,1,'default','active','b',3,1000000.0,1000060.0,0.0,'{"id":"l3","run_id":"r","stage":"s","worker":1,"gang_id":"live","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":734003200,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"b","devices":[],"fence":3,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005000.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}');
INSERT INTO "leases" VALUES('l4','events','r','e',0,1,'default','active','a',4,1000000.0,1000060.0,0.0,'{"id":"l4","run_id":"r","stage":"e","worker":0,"gang_id":"events","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":67108864,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":5000.0,"total_s":50000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":true,"expects_result":true,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"active","attempt":1,"node":"a","devices":[],"fence":4,"requested_at_s":1000000.0,"starts_at_s":1000000.0,"ends_at_s":1005001.0,"total_ends_at_s":1050000.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}');
INSERT INTO "leases" VALUES('l5','waits','r','w',0,0,'default','queued','',0,1000002.0,1006002.0,0.0,'{"id":"l5","run_id":"r","stage":"w","worker":0,"gang_id":"waits","tenant":"default","envelope":{"cpus":0.5,"memory_bytes":943718400,"gpus":0.0,"gpu_memory_bytes":0,"disk_bytes":1073741824,"slot_s":100.0,"total_s":1000.0},"command":{"argv":["work"],"env":{},"workdir":"","on_event":false,"expects_result":false,"grace_s":5.0,"network":"host","ports":{},"secrets":[]},"state":"queued","attempt":0,"node":"","devices":[],"fence":0,"requested_at_s":1000002.0,"starts_at_s":0.0,"ends_at_s":0.0,"total_ends_at_s":0.0,"ended_at_s":0.0,"end_reason":null,"end_detail":""}');
CREATE TABLE meta (
	"key" VARCHAR(64) NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "meta" VALUES('fence','4');
CREATE TABLE nodes (
	name VARCHAR(128) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "nodes" VALUES('a','up','{"name":"a","capacity":{"cpus":4.0,"memory_bytes":1073741824,"disk_bytes":0,"gpus":[]},"machine":{"cpu_model":"fake","cpu_features":[],"cores":1,"memory_bytes":0,"gpu_model":"","gpus":0,"kernel":"","python":""},"runtimes":["process"],"bounds":{},"confinement":{},"state":"up","term_s":60.0}');
INSERT INTO "nodes" VALUES('b','up','{"name":"b","capacity":{"cpus":4.0,"memory_bytes":1073741824,"disk_bytes":0,"gpus":[]},"machine":{"cpu_model":"fake","cpu_features":[],"cores":1,"memory_bytes":0,"gpu_model":"","gpus":0,"kernel":"","python":""},"runtimes":["process"],"bounds":{},"confinement":{},"state":"up","term_s":60.0}');
CREATE TABLE recommendations (
	position INTEGER NOT NULL, 
	id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(128) NOT NULL, 
	stage VARCHAR(128) NOT NULL, 
	at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (position), 
	UNIQUE (id)
);
CREATE TABLE runs (
	id VARCHAR(128) NOT NULL, 
	tenant VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	created_at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "runs" VALUES('r','default','pending',1000.0,'{"id":"r","name":"released","tenant":"default","job_file":"","source":"","state":"pending","stages":[],"created_at_s":1000.0}');
CREATE TABLE stages (
	run_id VARCHAR(128) NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	position INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (run_id, name)
);
INSERT INTO "stages" VALUES('r','s',0,'pending','','{"name":"s","kind":"task","state":"pending","fingerprint":"","attempts":0,"artefacts":{},"detail":""}');
INSERT INTO "stages" VALUES('r','t',1,'pending','','{"name":"t","kind":"task","state":"pending","fingerprint":"","attempts":0,"artefacts":{},"detail":""}');
CREATE TABLE trials (
	position INTEGER NOT NULL, 
	id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(128) NOT NULL, 
	stage VARCHAR(128) NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	source VARCHAR(16) NOT NULL, 
	at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (position), 
	UNIQUE (id)
);
INSERT INTO "trials" VALUES(1,'t1','r','s','f','probe',0.0,'{"id":"t1","run_id":"r","stage":"s","fingerprint":"f","source":"probe","configuration":{"cpus":0.5},"metrics":{"round_s":{"n":2,"mean":1.5,"sd":0.7071067811865476,"minimum":1.0,"median":1.5,"maximum":2.0}},"bounds":{},"machine":{"cpu_model":"x","cpu_features":[],"cores":1,"memory_bytes":0,"gpu_model":"","gpus":0,"kernel":"","python":""},"versions":{},"seed":0,"at_s":0.0,"curves":{},"note":""}');
CREATE TABLE usage_points (
	id INTEGER NOT NULL, 
	lease_id VARCHAR(128) NOT NULL, 
	at_s FLOAT NOT NULL, 
	body TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE INDEX ix_events_run ON events (run_id, seq);
CREATE INDEX ix_runs_created ON runs (created_at_s);
CREATE INDEX ix_leases_gang ON leases (gang_id);
CREATE INDEX ix_leases_run ON leases (run_id, stage, worker);
CREATE INDEX ix_leases_state ON leases (state);
CREATE INDEX ix_invocations_lease ON invocations (lease_id);
CREATE INDEX ix_usage_lease ON usage_points (lease_id, at_s);
CREATE INDEX ix_trials_fingerprint ON trials (fingerprint);
CREATE INDEX ix_trials_run ON trials (run_id);
CREATE INDEX ix_recommendations_run ON recommendations (run_id);
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only'); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',26);
COMMIT;
