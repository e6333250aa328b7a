/* The load generator: one epoll loop that checks every reply.
 *
 *   load pipeline HOST PORT CONNECTIONS DEPTH SECONDS [FROM]   repeat: send DEPTH commands (WHO, WHERE, WHY in turn), read the replies
 *   load shuffled HOST PORT CONNECTIONS DEPTH SECONDS [FROM]   the same, in a new order each time
 *   load connect  HOST PORT CONCURRENCY SECONDS [FROM]         repeat: connect, send WHO, read the reply, close
 *   load hold     HOST PORT CONNECTIONS [FROM]                 connect, send WHO, read the reply, stay connected
 *
 * Two options come before the mode, in this order:
 *
 *   load tls ...          TLS 1.3 with X25519, AES-256-GCM and a full handshake for each connection; the certificate is not
 *                         verified
 *   load lines LINES ...  `pipeline` and `shuffled` send these lines instead of WHO, WHERE and WHY. LINES holds up to 16 lines,
 *                         each with its line ending: 'who\r\nNOPE\n'. Blanks and case do not matter for the reply that is
 *                         expected. A line that is not WHO, WHERE, WHY or PING must be answered by ERR unknown command.
 *
 * FROM is the source address. Prints `start` when warm, then a line of JSON, and stays until the end of its stdin; `hold`
 * prints `held N` and then answers `ask` on stdin by `answered N LOWEST HIGHEST`. Latency is from the write of a batch to
 * its last reply.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* Kinds of replies. PING is the command in bench/own. */
enum { WHO, WHERE, WHY, PING, UNKNOWN };
/* The state of a client: connecting, then the TLS handshake if any, then its commands. */
enum { CONNECTED, BY_TCP, BY_TLS };
enum { MAX_LINES = 16, MAX_LINE = 16, MAX_DEPTH = 2048, ORDER = 65535, OPENING = 256, MAX_EVENTS = 512, SLOTS = 200000 };

/* A shorter measurement also has a shorter warm-up. */
#define WARM_SECONDS 0.5
#define SHOWN(length) ((int)((length) < 64 ? (length) : 64))

typedef struct {
    int fd, connecting, next, expected, length;
    long long sent_at;
    SSL *ssl;
    char line[128]; /* an incomplete reply */
} Client;

static const char *const NAMES[UNKNOWN] = {"WHO", "WHERE", "WHY", "PING"};
/* The lines to send, from `lines`. */
static struct {
    const char *text;
    int length, kind;
} lines[MAX_LINES];
static int line_count;
static struct sockaddr_in server, from;
static SSL_CTX *tls; /* NULL without TLS */
static int epoll, depth = 1, asks_who_only, closes_after, clients;
static char id[128]; /* of the server: its first reply to WHERE */
/* All commands in order. Each client starts at a different position. */
static unsigned char kinds[ORDER + MAX_DEPTH];
static char text[(ORDER + MAX_DEPTH) * MAX_LINE];
static int starts[ORDER + MAX_DEPTH + 1];
static long long answers, errors, lowest, highest;
static unsigned *latencies; /* counts by tenths of a microsecond; logarithmic beyond 10 ms */
static int measuring;

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void wrong(const char *format, ...) {
    if (++errors > 10) {
        if (errors < 1000) return;
        fputs("load: too many errors\n", stderr);
        exit(1);
    }
    va_list list;
    va_start(list, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
}

static void open_client(Client *client) {
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (client->fd < 0) die("socket");
    int one = 1;
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (from.sin_family && bind(client->fd, (struct sockaddr *)&from, sizeof from)) die("bind");
    if (connect(client->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS) die("connect");
    client->connecting = BY_TCP;
    client->expected = client->length = 0;
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = client};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, client->fd, &event)) die("epoll_ctl");
}

/* Returns 1 if a connecting client may send, 0 if it must wait, -1 if it has failed. */
static int go_on(Client *client) {
    if (client->connecting == BY_TCP) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            wrong("connect: %s", strerror(error));
            return -1;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
        epoll_ctl(epoll, EPOLL_CTL_MOD, client->fd, &event);
        client->connecting = tls ? BY_TLS : CONNECTED;
        if (tls && (!(client->ssl = SSL_new(tls)) || !SSL_set_fd(client->ssl, client->fd))) die("SSL_new");
    }
    if (client->connecting == BY_TLS) {
        int done = SSL_connect(client->ssl);
        if (done != 1 && SSL_get_error(client->ssl, done) == SSL_ERROR_WANT_READ) return 0;
        if (done != 1) {
            const char *reason = ERR_reason_error_string(ERR_peek_last_error());
            wrong("handshake: %s", reason ? reason : "closed");
            return -1;
        }
        client->connecting = CONNECTED;
    }
    return 1;
}

static void let_go(Client *client) {
    if (client->ssl && !client->connecting) SSL_shutdown(client->ssl);
    SSL_free(client->ssl);
    client->ssl = NULL;
    close(client->fd);
}

static ssize_t put(Client *client, const char *data, int size) {
    return tls ? SSL_write(client->ssl, data, size) : write(client->fd, data, size);
}

/* Like `read`. With TLS, one record at most: the others stay in the socket, and epoll reports them. */
static ssize_t get(Client *client, char *data, int size) {
    if (!tls) return read(client->fd, data, size);
    int got = SSL_read(client->ssl, data, size);
    if (got > 0) return got;
    int error = SSL_get_error(client->ssl, got);
    if (error == SSL_ERROR_ZERO_RETURN) return 0;
    errno = error == SSL_ERROR_WANT_READ ? EAGAIN : EPROTO;
    return -1;
}

static void ask(Client *client) {
    client->next %= ORDER;
    const char *data = asks_who_only ? "WHO\n" : text + starts[client->next];
    int size = asks_who_only ? 4 : starts[client->next + depth] - starts[client->next];
    client->expected = asks_who_only ? 1 : depth;
    client->sent_at = now_ns();
    /* A batch is much smaller than an empty socket buffer, and the previous one has been answered. */
    if (put(client, data, size) != size) wrong("short write: %s", strerror(errno));
}

static int slot_of(long long ns) {
    long long tenths = ns / 100;
    if (tenths < 100000) return (int)tenths;
    int slot = 100000;
    for (double edge = 100000; edge * 1.001 < tenths && slot < SLOTS - 1; edge *= 1.001) slot++;
    return slot;
}

static double value_of(int slot) {
    if (slot < 100000) return slot / 10.0;
    double edge = 100000;
    for (int i = 100000; i < slot; i++) edge *= 1.001;
    return edge / 10.0;
}

static double percentile(double share) {
    long long total = 0, seen = 0;
    for (int i = 0; i < SLOTS; i++) total += latencies[i];
    for (int i = 0; i < SLOTS; i++)
        if ((seen += latencies[i]) >= total * share && total) return value_of(i);
    return 0;
}

static int is_exactly(const char *wanted, const char *line, int length) {
    return length == (int)strlen(wanted) && !memcmp(line, wanted, length);
}

static void check(Client *client, const char *line, int length) {
    int kind = asks_who_only ? WHO : kinds[client->next++];
    if (kind == WHO) {
        char *end;
        long long number = strtoll(line, &end, 10);
        if (end != line + length || !length || number < 1 || number > 1000000) wrong("WHO: %.*s", SHOWN(length), line);
        if (number < lowest) lowest = number;
        if (number > highest) highest = number;
    } else if (kind == WHY) {
        if (!is_exactly("42", line, length)) wrong("WHY: %.*s", SHOWN(length), line);
    } else if (kind == PING) {
        if (!is_exactly("PONG", line, length)) wrong("PING: %.*s", SHOWN(length), line);
    } else if (kind == UNKNOWN) {
        if (!is_exactly("ERR unknown command", line, length)) wrong("unknown: %.*s", SHOWN(length), line);
    } else if (!id[0]) {
        if (length < 1 || length > 64)
            wrong("WHERE: %d bytes", length);
        else
            memcpy(id, line, length);
    } else if (!is_exactly(id, line, length)) {
        wrong("WHERE: %.*s", SHOWN(length), line);
    }
}

/* Returns 0 if the client was closed. */
static int receive(Client *client) {
    static char buffer[131072];
    memcpy(buffer, client->line, client->length);
    ssize_t got = get(client, buffer + client->length, sizeof buffer - client->length);
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) return 1;
        wrong("closed: %s", got ? strerror(errno) : "end of input");
        return 0;
    }
    char *line = buffer, *end = buffer + client->length + got, *newline;
    while ((newline = memchr(line, '\n', end - line))) {
        if (client->expected-- <= 0) wrong("a reply too many: %.*s", SHOWN(newline - line), line);
        check(client, line, newline - line);
        line = newline + 1;
        if (measuring) answers++;
    }
    client->length = end - line;
    if (client->length >= (int)sizeof client->line) {
        wrong("a reply without end");
        return 0;
    }
    memcpy(client->line, line, client->length);
    if (client->expected == 0 && measuring) latencies[slot_of(now_ns() - client->sent_at)]++;
    return 1;
}

static void report(double seconds) {
    printf("{\"seconds\": %.4f, \"answers\": %lld, \"errors\": %lld, \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f}\n",
           seconds, answers, errors, percentile(0.5), percentile(0.99), percentile(0.999));
    fflush(stdout);
}

/* Runs the loop until a time, or, if `count` is given, until that many clients have their reply. */
static int run(long long until, int count, int goes_on) {
    struct epoll_event events[MAX_EVENTS];
    int answered = 0;
    while ((!until || now_ns() < until) && (!count || answered < count)) {
        int ready = epoll_wait(epoll, events, MAX_EVENTS, 100);
        for (int i = 0; i < ready; i++) {
            Client *client = events[i].data.ptr;
            if (client->connecting) {
                int is_connected = go_on(client);
                if (is_connected > 0) ask(client);
                if (is_connected >= 0) continue;
                let_go(client);
                answered++;
                if (goes_on) open_client(client);
                continue;
            }
            int is_there = receive(client);
            if (is_there && client->expected > 0) continue;
            answered++;
            if (!is_there || closes_after) {
                let_go(client);
                if (goes_on) open_client(client);
            } else if (goes_on) {
                ask(client);
            }
        }
    }
    return answered;
}

static void hold(Client *all) {
    for (int opened = 0; opened < clients;) {
        int some = clients - opened < OPENING ? clients - opened : OPENING;
        for (int i = 0; i < some; i++) open_client(&all[opened++]);
        run(0, some, 0);
    }
    if (errors) exit(1);
    printf("held %d\n", clients);
    fflush(stdout);
    char word[16];
    while (fgets(word, sizeof word, stdin)) {
        lowest = 1000000, highest = 0;
        long long before = errors;
        int answered = 0;
        for (int at = 0; at < clients;) {
            int some = clients - at < OPENING ? clients - at : OPENING;
            for (int i = 0; i < some; i++) ask(&all[at++]);
            answered += run(now_ns() + 30000000000LL, some, 0);
        }
        printf("answered %lld %lld %lld\n", answered - (errors - before), lowest, highest);
        fflush(stdout);
    }
}

static void use_tls(void) {
    tls = SSL_CTX_new(TLS_client_method());
    if (!tls || !SSL_CTX_set_min_proto_version(tls, TLS1_3_VERSION) || !SSL_CTX_set1_groups_list(tls, "X25519") ||
        !SSL_CTX_set_ciphersuites(tls, "TLS_AES_256_GCM_SHA384"))
        die("SSL_CTX_new");
    SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);
}

static int kind_of(const char *line, int length) {
    while (length && isspace((unsigned char)*line)) line++, length--;
    while (length && isspace((unsigned char)line[length - 1])) length--;
    for (int kind = 0; kind < UNKNOWN; kind++)
        if (length == (int)strlen(NAMES[kind]) && !strncasecmp(line, NAMES[kind], length)) return kind;
    return UNKNOWN;
}

static void use_lines(const char *all) {
    line_count = 0;
    do {
        const char *newline = strchr(all, '\n');
        if (!newline || newline - all >= MAX_LINE || line_count == MAX_LINES) {
            fprintf(stderr, "load: LINES holds up to %d lines, each of up to %d bytes and with its newline\n", MAX_LINES, MAX_LINE);
            exit(2);
        }
        lines[line_count].text = all;
        lines[line_count].length = newline + 1 - all;
        lines[line_count].kind = kind_of(all, lines[line_count].length);
        line_count++;
        all = newline + 1;
    } while (*all);
}

/* Lays out the commands in the order in which they are sent. */
static void fill_text(int is_shuffled) {
    for (int i = 0; i < ORDER + MAX_DEPTH; i++) {
        int line = is_shuffled ? random() % line_count : i % line_count;
        kinds[i] = lines[line].kind;
        memcpy(text + starts[i], lines[line].text, lines[line].length);
        starts[i + 1] = starts[i] + lines[line].length;
    }
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    if (count > 1 && !strcmp(words[1], "tls")) {
        use_tls();
        count--, words++;
    }
    use_lines("WHO\nWHERE\nWHY\n");
    if (count > 2 && !strcmp(words[1], "lines")) {
        use_lines(words[2]);
        count -= 2, words += 2;
    }
    int is_connect = count > 1 && !strcmp(words[1], "connect"), is_hold = count > 1 && !strcmp(words[1], "hold");
    int is_shuffled = count > 1 && !strcmp(words[1], "shuffled");
    int needed = is_connect ? 6 : is_hold ? 5 : 7;
    if (count < needed || count > needed + 1) {
        fprintf(stderr, "usage: load pipeline HOST PORT CONNECTIONS DEPTH SECONDS [FROM]\n"
                        "       load shuffled HOST PORT CONNECTIONS DEPTH SECONDS [FROM]\n"
                        "       load connect HOST PORT CONCURRENCY SECONDS [FROM]\n"
                        "       load hold HOST PORT CONNECTIONS [FROM]\n"
                        "       load tls ..., the same over TLS\n"
                        "       load [tls] lines LINES ..., with these lines\n");
        return 2;
    }
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(words[3]));
    inet_pton(AF_INET, words[2], &server.sin_addr);
    clients = atoi(words[4]);
    if (!is_connect && !is_hold) depth = atoi(words[5]);
    if (depth < 1 || depth > MAX_DEPTH) die("depth");
    double seconds = is_hold ? 0 : atof(words[needed - 1]);
    if (count > needed) {
        from.sin_family = AF_INET;
        inet_pton(AF_INET, words[needed], &from.sin_addr);
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    asks_who_only = is_connect || is_hold;
    closes_after = is_connect;
    fill_text(is_shuffled);
    latencies = calloc(SLOTS, sizeof *latencies);
    Client *all = calloc(clients, sizeof *all);
    for (int i = 0; i < clients; i++) all[i].next = random() % ORDER;
    epoll = epoll_create1(0);
    if (is_hold) {
        hold(all);
        return 0;
    }
    /* A few at a time, so that no server's queue of new connections overflows. */
    for (int opened = 0; opened < clients;) {
        int some = clients - opened < OPENING ? clients - opened : OPENING;
        for (int i = 0; i < some; i++) open_client(&all[opened++]);
        run(0, some, 0);
    }
    if (errors) exit(1);
    for (int i = 0; i < clients; i++)
        if (!closes_after) ask(&all[i]);
        else open_client(&all[i]);
    run(now_ns() + (long long)((seconds < WARM_SECONDS ? seconds : WARM_SECONDS) * 1e9), 0, 1);
    printf("start\n");
    fflush(stdout);
    measuring = 1;
    long long started = now_ns();
    run(started + (long long)(seconds * 1e9), 0, 1);
    report((now_ns() - started) / 1e9);
    while (getchar() != EOF) continue; /* The cost of closing all clients must not be measured. */
    return 0;
}
