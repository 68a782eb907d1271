/* The first program of a microVM: makes the machine usable, runs one program, says how it ended, resets the machine.
 *
 * It needs no C library, so that it is a few kilobytes and the same wherever it is built (`build.sh` beside it). What it is to
 * do stands in /config of its initramfs: words `key=value`, each ended by a zero byte, in this order of use:
 *
 *   token=T        how lines for the host begin that no program inside can know: a byte 1, T, a space, words, a line end, anywhere in the output
 *   module=FILE    of /modules, loaded in the order given
 *   root=TYPE      of the read-only file system on the first virtio-blk device (squashfs, erofs); left out: stay in memory
 *   tmpfs=DIR:OPTS writable, in memory; made where it is missing and can be
 *   address=A.B.C.D, gateway=A.B.C.D   of the one network device, /24; left out: loopback only
 *   set=PATH=VALUE of /proc/sys
 *   worker=DIR     where result.json and endpoints.json are looked for; /lease.json of the initramfs is copied there
 *   relay=NAME     a file of DIR that the host is sent whenever it is complete: `file NAME HEX`
 *   uid=N, gid=N, workdir=DIR, env=NAME=VALUE, arg=WORD
 *
 * From the host, on the console: `T term\n` sends the program SIGTERM.
 * To the host: `up`, `program PID`, `noexec ERRNO WHAT`, `file NAME HEX`, `exit CODE SIGNAL OOM_KILLS`, `broken WHAT ERRNO`.
 */

#define _GNU_SOURCE
#include <asm/termbits.h>
#include <asm/ioctls.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

typedef unsigned long ulong_t;
typedef unsigned char u8;

#define MAX_CONFIG (1 << 20)
#define MAX_WORDS 4096
#define MAX_RELAY (1 << 20)
#define LOOK_MS 500

/* --- system calls --- */

static long call6(long n, long a, long b, long c, long d, long e, long f)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}
#define call(n, a, b, c, d) call6((n), (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

void *memset(void *to, int value, ulong_t size)
{
	u8 *at = to;
	while (size--)
		*at++ = (u8)value;
	return to;
}

void *memcpy(void *to, const void *from, ulong_t size)
{
	u8 *at = to;
	const u8 *source = from;
	while (size--)
		*at++ = *source++;
	return to;
}

static ulong_t length(const char *text)
{
	ulong_t n = 0;
	while (text[n])
		n++;
	return n;
}

static const char *after(const char *text, const char *prefix)
{
	while (*prefix)
		if (*text++ != *prefix++)
			return 0;
	return text;
}

static int same(const char *a, const char *b)
{
	const char *rest = after(a, b);
	return rest && !*rest;
}

static ulong_t number(const char *text)
{
	ulong_t value = 0;
	while (*text >= '0' && *text <= '9')
		value = value * 10 + (ulong_t)(*text++ - '0');
	return value;
}

static char *put(char *at, const char *text)
{
	while (*text)
		*at++ = *text++;
	*at = 0;
	return at;
}

static char *put_number(char *at, ulong_t value)
{
	char digits[24];
	int n = 0;
	do {
		digits[n++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (n)
		*at++ = digits[--n];
	*at = 0;
	return at;
}

/* --- what the host reads --- */

static const char *token = "";

static void write_all(int fd, const char *data, ulong_t size)
{
	while (size) {
		long n = call(__NR_write, fd, data, size, 0);
		if (n <= 0 && n != -EINTR && n != -EAGAIN)
			return;
		if (n > 0) {
			data += n;
			size -= (ulong_t)n;
		}
	}
}

/* One write each, and no word of the kernel in its middle. */
static void say_raw(char *line, char *end)
{
	*end++ = '\n';
	call(__NR_syslog, 8, 0, 1, 0);
	write_all(1, line, (ulong_t)(end - line));
	call(__NR_ioctl, 1, TCSBRK, 1, 0); /* tcdrain */
	call(__NR_syslog, 8, 0, 4, 0);
}

static char *begin(char *line)
{
	line[0] = 1;
	return put(put(line + 1, token), " ");
}

static void say(const char *words, const char *what, long value)
{
	char line[512], *at = begin(line);
	at = put(at, words);
	if (what) {
		ulong_t n = length(what);
		*at++ = ' ';
		memcpy(at, what, n > 256 ? 256 : n);
		at += n > 256 ? 256 : n;
	}
	*at++ = ' ';
	at = put_number(at, (ulong_t)(value < 0 ? -value : value));
	say_raw(line, at);
}

static void leave(void)
{
	call(__NR_sync, 0, 0, 0, 0);
	call(__NR_ioctl, 1, TCSBRK, 1, 0);
	call(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, 0);
	for (;;)
		call(__NR_pause, 0, 0, 0, 0);
}

static void broken(const char *what, long error)
{
	say("broken", what, error);
	leave();
}

/* --- files --- */

static char config[MAX_CONFIG];
static char *words[MAX_WORDS];
static int word_count;

static long read_file(const char *path, char *to, ulong_t room)
{
	long fd = call(__NR_open, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0, 0);
	ulong_t size = 0;
	if (fd < 0)
		return fd;
	while (size < room) {
		long n = call(__NR_read, fd, to + size, room - size, 0);
		if (n == -EINTR)
			continue;
		if (n <= 0)
			break;
		size += (ulong_t)n;
	}
	call(__NR_close, fd, 0, 0, 0);
	return (long)size;
}

static void write_text(const char *path, const char *text)
{
	long fd = call(__NR_open, path, O_WRONLY | O_CLOEXEC, 0, 0);
	if (fd < 0)
		return;
	write_all((int)fd, text, length(text));
	call(__NR_close, fd, 0, 0, 0);
}

static void read_config(void)
{
	long size = read_file("/config", config, sizeof config - 1), at = 0;
	if (size < 0)
		broken("/config", size);
	while (at < size && word_count < MAX_WORDS) {
		words[word_count++] = config + at;
		while (at < size && config[at])
			at++;
		at++;
	}
	call(__NR_unlink, "/config", 0, 0, 0);
}

static const char *value_of(const char *key)
{
	for (int i = 0; i < word_count; i++) {
		const char *value = after(words[i], key);
		if (value && *value == '=')
			return value + 1;
	}
	return 0;
}

static void make_folders(const char *path, int mode)
{
	char part[512];
	ulong_t n = 0;
	for (; path[n] && n < sizeof part - 1; n++) {
		part[n] = path[n];
		if (n && path[n] == '/') {
			part[n] = 0;
			call(__NR_mkdir, part, 0755, 0, 0);
			part[n] = '/';
		}
	}
	part[n] = 0;
	call(__NR_mkdir, part, mode, 0, 0);
}

static void pause_ms(long ms)
{
	struct { long s, ns; } time = { ms / 1000, ms % 1000 * 1000000 };
	call(__NR_nanosleep, &time, 0, 0, 0);
}

/* --- the machine --- */

static void load_modules(void)
{
	for (int i = 0; i < word_count; i++) {
		const char *name = after(words[i], "module=");
		char path[256];
		long fd, error;
		if (!name || length(name) > 200)
			continue;
		put(put(path, "/modules/"), name);
		fd = call(__NR_open, path, O_RDONLY | O_CLOEXEC, 0, 0);
		if (fd < 0)
			broken(name, fd);
		error = call(__NR_finit_module, fd, "", 0, 0);
		if (error < 0 && error != -EEXIST)
			broken(name, error);
		call(__NR_close, fd, 0, 0, 0);
		call(__NR_unlink, path, 0, 0, 0);
	}
}

static void mount_one(const char *kind, const char *where, ulong_t flags, const char *options)
{
	make_folders(where, 0755);
	call6(__NR_mount, (long)kind, (long)where, (long)kind, (long)flags, (long)options, 0);
}

static void enter_root(void)
{
	const char *kind = value_of("root");
	long error = 0;
	if (kind) {
		for (int i = 0; i < 5000; i++) {
			struct stat found;
			if ((error = call(__NR_stat, "/dev/vda", &found, 0, 0)) == 0)
				break;
			pause_ms(2);
		}
		if (error)
			broken("no virtio-blk device", error);
		call(__NR_mkdir, "/root", 0755, 0, 0);
		error = call6(__NR_mount, (long)"/dev/vda", (long)"/root", (long)kind, MS_RDONLY, 0, 0);
		if (error)
			broken("the root file system", error);
		call6(__NR_mount, (long)"/dev", (long)"/root/dev", 0, MS_MOVE, 0, 0);
		call(__NR_unlink, "/init", 0, 0, 0);
		call(__NR_chdir, "/root", 0, 0, 0);
		error = call6(__NR_mount, (long)".", (long)"/", 0, MS_MOVE, 0, 0);
		if (error)
			broken("moving the root", error);
		call(__NR_chroot, ".", 0, 0, 0);
		call(__NR_chdir, "/", 0, 0, 0);
	}
	mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0);
	mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, 0);
	for (int i = 0; i < word_count; i++) {
		const char *folder = after(words[i], "tmpfs=");
		char path[512];
		ulong_t n = 0;
		if (!folder)
			continue;
		while (folder[n] && folder[n] != ':' && n < sizeof path - 1) {
			path[n] = folder[n];
			n++;
		}
		path[n] = 0;
		mount_one("tmpfs", path, MS_NOSUID | MS_NODEV, folder[n] ? folder + n + 1 : 0);
	}
	for (int i = 0; i < word_count; i++) {
		const char *setting = after(words[i], "set=");
		char path[512], *at = put(path, "/proc/sys/");
		if (!setting)
			continue;
		while (*setting && *setting != '=' && at < path + sizeof path - 1)
			*at++ = *setting++;
		*at = 0;
		write_text(path, setting + (*setting == '='));
	}
}

static unsigned int address_of(const char *text)
{
	unsigned int value = 0;
	for (int i = 0; i < 4; i++) {
		value |= (unsigned int)number(text) << (8 * i);
		while (*text && *text != '.')
			text++;
		text += *text == '.';
	}
	return value;
}

static void set_address(struct sockaddr *to, unsigned int address)
{
	struct sockaddr_in *in = (struct sockaddr_in *)to;
	memset(to, 0, sizeof *to);
	in->sin_family = AF_INET;
	in->sin_addr.s_addr = address;
}

static void start_network(void)
{
	struct ifreq request;
	const char *address = value_of("address"), *gateway = value_of("gateway");
	long control = call(__NR_socket, AF_INET, SOCK_DGRAM, 0, 0), error = 0;
	memset(&request, 0, sizeof request);
	put(request.ifr_name, "lo");
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	call(__NR_ioctl, control, SIOCSIFFLAGS, &request, 0);
	if (address) {
		memset(&request, 0, sizeof request);
		put(request.ifr_name, "eth0");
		set_address(&request.ifr_addr, address_of(address));
		for (int i = 0; i < 2500; i++) {
			if ((error = call(__NR_ioctl, control, SIOCSIFADDR, &request, 0)) == 0)
				break;
			pause_ms(2);
		}
		if (error)
			broken("no virtio-net device", error);
		set_address(&request.ifr_netmask, 0x00ffffff);
		call(__NR_ioctl, control, SIOCSIFNETMASK, &request, 0);
		request.ifr_flags = IFF_UP | IFF_RUNNING;
		call(__NR_ioctl, control, SIOCSIFFLAGS, &request, 0);
	}
	if (gateway) {
		struct rtentry route;
		memset(&route, 0, sizeof route);
		set_address(&route.rt_gateway, address_of(gateway));
		set_address(&route.rt_dst, 0);
		set_address(&route.rt_genmask, 0);
		route.rt_flags = RTF_UP | RTF_GATEWAY;
		call(__NR_ioctl, control, SIOCADDRT, &route, 0);
	}
	call(__NR_close, control, 0, 0, 0);
}

/* --- the program --- */

static char *arguments[MAX_WORDS + 1], *environment[MAX_WORDS + 1];

static void collect(const char *key, char **to)
{
	int n = 0;
	for (int i = 0; i < word_count; i++) {
		const char *value = after(words[i], key);
		if (value)
			to[n++] = (char *)value;
	}
	to[n] = 0;
}

/* Execute arguments[0], looked for along PATH when it names no folder. Returns the error. */
static long execute(void)
{
	const char *path = "/usr/local/bin:/usr/bin:/bin";
	long error = -ENOENT, last;
	for (const char *at = arguments[0]; *at; at++)
		if (*at == '/')
			return call(__NR_execve, arguments[0], arguments, environment, 0);
	for (int i = 0; environment[i]; i++)
		if (after(environment[i], "PATH="))
			path = environment[i] + 5;
	while (*path) {
		char full[1024];
		ulong_t n = 0;
		while (path[n] && path[n] != ':' && n < 700) {
			full[n] = path[n];
			n++;
		}
		path += n + (path[n] == ':');
		full[n++] = '/';
		if (length(arguments[0]) > 300)
			return -ENOENT;
		put(full + n, arguments[0]);
		last = call(__NR_execve, full, arguments, environment, 0);
		if (last != -ENOENT && last != -ENOTDIR)
			error = last;
	}
	return error;
}

static void become_program(int failure)
{
	const char *uid = value_of("uid"), *gid = value_of("gid"), *workdir = value_of("workdir");
	ulong_t none = 0;
	long error = 0;
	const char *step = "the program";
	long null = call(__NR_open, "/dev/null", O_RDONLY, 0, 0);
	call(__NR_setsid, 0, 0, 0, 0);
	call(__NR_dup2, null, 0, 0, 0);
	call6(__NR_rt_sigprocmask, 2, (long)&none, 0, 8, 0, 0);
	if (gid && !error) {
		call(__NR_setgroups, 0, 0, 0, 0);
		error = call(__NR_setgid, number(gid), 0, 0, 0);
	}
	if (uid && !error)
		error = call(__NR_setuid, number(uid), 0, 0, 0);
	if (!error && workdir && (error = call(__NR_chdir, workdir, 0, 0, 0)))
		step = "its working directory";
	if (!error)
		error = execute();
	call(__NR_write, failure, &error, sizeof error, 0);
	call(__NR_write, failure, step, length(step), 0);
	call(__NR_exit_group, 127, 0, 0, 0);
}

/* --- what it leaves --- */

static char relayed[MAX_RELAY + 1];
static char line[2 * MAX_RELAY + 512];

static void relay(const char *folder, const char *name)
{
	static const char hex[] = "0123456789abcdef";
	char path[600], *at;
	long size;
	if (length(folder) + length(name) > sizeof path - 2)
		return;
	put(put(put(path, folder), "/"), name);
	size = read_file(path, relayed, sizeof relayed);
	if (size < 0 || size > MAX_RELAY)
		return;
	at = put(put(put(begin(line), "file "), name), " ");
	for (long i = 0; i < size; i++) {
		*at++ = hex[(u8)relayed[i] >> 4];
		*at++ = hex[(u8)relayed[i] & 15];
	}
	say_raw(line, at);
}

static int is_relayed(const char *name)
{
	for (int i = 0; i < word_count; i++) {
		const char *value = after(words[i], "relay=");
		if (value && same(value, name))
			return 1;
	}
	return 0;
}

static void look(long watch, const char *folder)
{
	char events[4096] __attribute__((aligned(8)));
	long size = call(__NR_read, watch, events, sizeof events, 0), at = 0;
	while (at < size) {
		struct inotify_event *event = (struct inotify_event *)(events + at);
		if (event->len && is_relayed(event->name))
			relay(folder, event->name);
		at += (long)(sizeof *event + event->len);
	}
}

static ulong_t oom_kills(void)
{
	static char text[16384];
	long size = read_file("/proc/vmstat", text, sizeof text - 1);
	if (size < 0)
		return 0;
	text[size] = 0;
	for (char *at = text; *at; at++) {
		const char *found = (at == text || at[-1] == '\n') ? after(at, "oom_kill ") : 0;
		if (found)
			return number(found);
	}
	return 0;
}

static int is_asked_to_leave(void)
{
	static char typed[256];
	static ulong_t n;
	char bytes[64];
	long size = call(__NR_read, 0, bytes, sizeof bytes, 0);
	int asked = 0;
	for (long i = 0; i < size; i++) {
		if (bytes[i] == '\n' || bytes[i] == '\r') {
			const char *rest;
			typed[n] = 0;
			rest = after(typed, token);
			asked |= rest && same(rest, " term");
			n = 0;
		} else if (n < sizeof typed - 1)
			typed[n++] = bytes[i];
	}
	return asked;
}

static void run(void)
{
	const char *worker = value_of("worker");
	ulong_t mask = 1ul << (SIGCHLD - 1);
	long signals, watch = -1, status = 0, program, failure[1] = { 0 };
	int pipe[2], open_ends = 1;
	char why[128];
	collect("arg=", arguments);
	collect("env=", environment);
	if (!arguments[0])
		broken("no program", ENOENT);
	if (worker) {
		watch = call(__NR_inotify_init1, O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
		call(__NR_inotify_add_watch, watch, worker, IN_CLOSE_WRITE | IN_MOVED_TO, 0);
	}
	call6(__NR_rt_sigprocmask, 0, (long)&mask, 0, 8, 0, 0);
	signals = call(__NR_signalfd4, -1, &mask, 8, SFD_CLOEXEC | SFD_NONBLOCK);
	call(__NR_pipe2, pipe, O_CLOEXEC, 0, 0);
	say("up", 0, 0);
	program = call(__NR_fork, 0, 0, 0, 0);
	if (program == 0)
		become_program(pipe[1]);
	call(__NR_close, pipe[1], 0, 0, 0);
	if (program < 0)
		broken("no process for the program", program);
	if (call(__NR_read, pipe[0], failure, sizeof failure, 0) == sizeof failure) {
		long n = call(__NR_read, pipe[0], why, sizeof why - 1, 0);
		why[n > 0 ? n : 0] = 0;
		say("noexec", why, failure[0]);
		leave();
	}
	call(__NR_close, pipe[0], 0, 0, 0);
	say("program", 0, program);
	while (open_ends) {
		struct pollfd ends[3] = { { (int)signals, POLLIN, 0 }, { 0, POLLIN, 0 }, { (int)watch, POLLIN, 0 } };
		char info[1024];
		call(__NR_poll, ends, 3, LOOK_MS, 0);
		if (ends[2].revents & POLLIN)
			look(watch, worker);
		if ((ends[1].revents & POLLIN) && is_asked_to_leave())
			call(__NR_kill, -program, SIGTERM, 0, 0);
		if (oom_kills()) /* what ran out of memory ends as a whole, whoever of it the kernel chose */
			open_ends = 0;
		if (ends[0].revents & POLLIN) {
			call(__NR_read, signals, info, sizeof info, 0);
			for (;;) {
				int found = 0;
				long pid = call(__NR_wait4, -1, &found, WNOHANG, 0);
				if (pid <= 0)
					break;
				if (pid == program) {
					status = found;
					open_ends = 0;
				}
			}
		}
	}
	call(__NR_kill, -1, SIGKILL, 0, 0);
	if (worker)
		look(watch, worker);
	{
		char record[256], *at = put(begin(record), "exit ");
		int number_of_signal = (int)(status & 0x7f);
		at = put_number(at, number_of_signal ? 0 : (ulong_t)((status >> 8) & 0xff));
		*at++ = ' ';
		at = put_number(at, (ulong_t)number_of_signal);
		*at++ = ' ';
		at = put_number(at, oom_kills());
		say_raw(record, at);
	}
	leave();
}

static void set_up_console(void)
{
	struct termios state;
	if (call(__NR_ioctl, 0, TCGETS, &state, 0) != 0)
		return;
	state.c_oflag &= ~(tcflag_t)OPOST;
	state.c_lflag &= ~(tcflag_t)(ECHO | ICANON | ISIG | IEXTEN);
	state.c_iflag &= ~(tcflag_t)(ICRNL | IXON);
	call(__NR_ioctl, 0, TCSETS, &state, 0);
}

static char lease[MAX_RELAY];

__attribute__((used)) static void begin_all(void)
{
	long lease_size;
	const char *worker;
	call(__NR_mkdir, "/dev", 0755, 0, 0);
	call6(__NR_mount, (long)"devtmpfs", (long)"/dev", (long)"devtmpfs", MS_NOSUID, 0, 0);
	set_up_console();
	read_config();
	if (value_of("token"))
		token = value_of("token");
	lease_size = read_file("/lease.json", lease, sizeof lease);
	call(__NR_unlink, "/lease.json", 0, 0, 0);
	load_modules();
	enter_root();
	start_network();
	worker = value_of("worker");
	if (worker) {
		char path[600];
		long fd, uid = value_of("uid") ? (long)number(value_of("uid")) : 0;
		make_folders(worker, 0755);
		call(__NR_chown, worker, uid, uid, 0);
		if (length(worker) < 500 && lease_size >= 0) {
			put(put(path, worker), "/lease.json");
			fd = call(__NR_open, path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644, 0);
			if (fd >= 0) {
				write_all((int)fd, lease, (ulong_t)lease_size);
				call(__NR_close, fd, 0, 0, 0);
			}
		}
	}
	run();
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall begin_all\n\thlt\n");
