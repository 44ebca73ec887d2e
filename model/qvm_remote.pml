/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The life of a command, from the client's queue to its result, with everything that may break or lie in between.
 *
 * One VM, NC commands. Steps are named after the functions they stand for. Whatever is one d_step is one step of the code: one
 * transaction of the ledger, one rename, one frame. Between any two steps the engine, the session or the client may end, dom0's
 * power may be cut, and who owns the VM's disk and agent (but not its key) may do what they like, as often as the budgets say.
 *
 * What is left out: sizes and limits, policy, rotation and revocation of keys, streams, several VMs (nothing is shared among them
 * but the ledger, whose rows are per VM, and the pool). HMAC is ideal: a token fits the id and body it was made for, and no other.
 *
 * Compile-time switches: the budgets, ATTACKER, and one for each mutation (see check.py, which runs them all).
 */
#ifndef NC
#define NC 1
#endif
#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef BREAKS
#define BREAKS 0
#endif
#ifndef POWERCUTS
#define POWERCUTS 0
#endif
#ifndef ATTACKS
#define ATTACKS 0
#endif
#ifndef TICKS
#define TICKS 0
#endif
#ifndef PRUNES
#define PRUNES 0
#endif
#ifndef FILLS
#define FILLS 0
#endif
#ifndef CLOCK_BACK
#define CLOCK_BACK 0
#endif

/* Bodies: that of command c is c + 1, as its client signed it; EVIL was signed by nobody. A token z + 1 is that of command z. */
#define NONE 0
#define EVIL 7
#define OF(c) ((c) + 1)

/* Rows of the ledger; CLAIMED < RUNNING < DONE < DELIVERED. */
#define CLAIMED 1
#define RUNNING 2
#define DONE 3
#define DELIVERED 4

/* What lies in results/<cid>: FORGED has no proof of dom0's, all others have one. */
#define OUTPUT 1
#define INTERRUPTED 2
#define REFUSED 3
#define REPLAY 4              /* refused, which does not say that it never ran, nor that it never will */
#define FORGED 5

/* A client. The last four are its ends, beside a result's word. */
#define IDLE 0
#define TOKEN_WRITTEN 1
#define WAITING 2
#define GIVES_UP 3
#define CANCEL_WRITTEN 4
#define ANSWERED 5
#define GAVE_UP 6
#define DIED 7

/* ---- the VM's disk ---- */
byte pending[NC];             /* the body */
byte auth[NC];                /* the token */
bit cancel_file[NC];
byte results[NC];

/* ---- clients ---- */
byte client[NC];
bit said_did_not_run[NC];
byte told[NC];

/* ---- dom0's disk ---- */
byte ledger[NC];
byte synced[NC];              /* what a power cut can not take back */
bit fresh[NC];
byte spool_body[NC];
byte spool_token[NC];
byte spool_result[NC];

/* ---- dom0's memory ---- */
bit up;                       /* the engine serves */
bit room = 1;                 /* on dom0's disk */
bit recovering;
bit session;                  /* as the VM's client sees it */
byte opening;                 /* 0 no session, 1 expire() has looked, 2 served */
bit waiting_in_ledger[NC];    /* what expire() saw */
bit polled;                   /* a poll's answer is there, or being worked at */
byte item_body[NC];
byte item_token[NC];
bit item_cancel[NC];
bit admitted[NC];
byte refusal[NC];             /* to be told */
bit untold[NC];
bit queued[NC];               /* waits in the pool */
byte worker[NC];              /* 0 none, 1 verified, 2 started, 3 ended by itself, 4 killed, 5 result kept, 6 recorded, 7 recorded without one */
bit stop[NC];                 /* cancelled: told to the sandbox, or _cancelled_early */
bit outbox[NC];
bit to_close[NC];

/* ---- ghosts: what happened, for the properties ---- */
byte runs[NC];
bit dropped[NC];              /* dom0 has told the VM that the cancelled command is done with */
bit power_was_cut;
bit attacked;
bit withheld[NC];             /* its request or result was taken away, or it was cancelled, by somebody else than its client */
bit calm;                     /* from now on nothing breaks, nobody gives up without need, and nobody attacks */

byte crashes = CRASHES, breaks = BREAKS, powercuts = POWERCUTS, attacks = ATTACKS, ticks = TICKS, prunes = PRUNES, clock_back = CLOCK_BACK, fills = FILLS;

#define FOR_ALL(c) c = 0; do :: c < NC ->
#define END_ALL(c) c++ :: else -> break od; c = 0

/* The agent's _forget_request */
#define forget_request(c) pending[c] = NONE; auth[c] = NONE; cancel_file[c] = 0

/* tokens.token_matches */
#ifdef BODY_NOT_IN_MAC
#define token_matches(c, body, token) ((token) == OF(c) && (body) != NONE)
#else
#define token_matches(c, body, token) ((token) == OF(c) && (body) == OF(c))
#endif

/* gate.check_new: freshness */
#ifdef STALE_IS_ALLOWED
#define STALE_ALLOWED 1
#else
#define STALE_ALLOWED 0
#endif
#ifdef NO_FRESHNESS
#define is_fresh(c) 1
#else
#define is_fresh(c) fresh[c]
#endif

/* What the property checks say of a run. */
#define begins_to_run(c) \
	runs[c]++; \
	assert(runs[c] <= 1);                                   /* at most once */ \
	assert(spool_body[c] == OF(c));                         /* only what the key's holder signed for this id */ \
	assert(!dropped[c] || stop[c] || attacked);             /* nothing begins once its cancel was seen, but what is killed at once */ \
	assert(told[c] != REFUSED);                             /* an authentic refusal is no lie, and stays none */ \
	assert(!said_did_not_run[c] || attacked)

#define forget_memory(c) \
	waiting_in_ledger[c] = 0; item_body[c] = NONE; item_token[c] = NONE; item_cancel[c] = 0; admitted[c] = 0; refusal[c] = NONE; \
	untold[c] = 0; queued[c] = 0; worker[c] = 0; stop[c] = 0; outbox[c] = 0; to_close[c] = 0

/* ---- qvm_remote_client.request ---- */
proctype client_of(byte c)
{
end_client:
	do
	/* submit(): .auth, then the command, each by rename */
	:: d_step { client[c] == IDLE -> auth[c] = OF(c); client[c] = TOKEN_WRITTEN }
#ifdef SECOND_DIES
	/* of the second command there is a token alone, for the attacker to use */
	:: d_step { client[c] == TOKEN_WRITTEN && c == 1 -> client[c] = DIED }
	:: d_step { client[c] == TOKEN_WRITTEN && c == 0 -> pending[c] = OF(c); client[c] = WAITING }
#else
	:: d_step { client[c] == TOKEN_WRITTEN -> pending[c] = OF(c); client[c] = WAITING }
#endif
	/* wait(): the result */
	:: d_step { client[c] == WAITING && results[c] != NONE && results[c] != FORGED ->
		told[c] = results[c]; results[c] = NONE; client[c] = ANSWERED;
		assert(told[c] != OUTPUT || runs[c] == 1);
		assert(told[c] != OUTPUT || ledger[c] >= DONE || ledger[c] == NONE || power_was_cut);  /* told is recorded */
		assert(told[c] != REFUSED || runs[c] == 0);
		assert(told[c] != REPLAY || attacked || FILLS > 0) }
	/* what is not dom0's is shown as a refusal without proof */
	:: d_step { client[c] == WAITING && results[c] == FORGED -> client[c] = ANSWERED; told[c] = FORGED; assert(attacked) }
	/* _check_patience(): not taken and unconnected; taken and unconnected */
	:: d_step { client[c] == WAITING && !session && results[c] == NONE && pending[c] != NONE ->
		client[c] = GIVES_UP;
#ifdef SAYS_DID_NOT_RUN
		said_did_not_run[c] = 1;
#endif
	}
	:: d_step { client[c] == WAITING && !session && results[c] == NONE && pending[c] == NONE -> client[c] = GIVES_UP }
#ifdef INTERRUPTS
	/* Ctrl-C */
	:: d_step { !calm && client[c] == WAITING && results[c] == NONE -> client[c] = GIVES_UP }
#endif
	/* give_up(): .cancel, then the request is taken back */
	:: d_step { client[c] == GIVES_UP -> cancel_file[c] = 1; client[c] = CANCEL_WRITTEN }
	:: d_step { client[c] == CANCEL_WRITTEN -> pending[c] = NONE; auth[c] = NONE; client[c] = GAVE_UP;
		assert(!said_did_not_run[c] || runs[c] == 0) }
#ifdef CLIENT_DIES
	:: d_step { !calm && client[c] >= TOKEN_WRITTEN && client[c] <= CANCEL_WRITTEN -> client[c] = DIED }
#endif
	:: client[c] >= ANSWERED -> break
	od
}

/* ---- pullrpc.puller, .session, .service: the VM's loop ---- */
#define listing_done(c) (!item_cancel[c] && item_body[c] == NONE && !admitted[c] && refusal[c] == NONE)
#if NC == 1
#define all_listed_done (listing_done(0))
#define no_cancels (!item_cancel[0])
#define all_verified (item_body[0] == NONE)
#define none_admitted (!admitted[0])
#define none_untold (!untold[0])
#define none_in_outbox (!outbox[0])
#define something_listed (pending[0] != NONE || cancel_file[0])
#define all_recovered (ledger[0] != CLAIMED && ledger[0] != RUNNING)
#else
#define all_listed_done (listing_done(0) && listing_done(1))
#define no_cancels (!item_cancel[0] && !item_cancel[1])
#define all_verified (item_body[0] == NONE && item_body[1] == NONE)
#define none_admitted (!admitted[0] && !admitted[1])
#define none_untold (!untold[0] && !untold[1])
#define none_in_outbox (!outbox[0] && !outbox[1])
#define something_listed (pending[0] != NONE || pending[1] != NONE || cancel_file[0] || cancel_file[1])
#define all_recovered (ledger[0] != CLAIMED && ledger[0] != RUNNING && ledger[1] != CLAIMED && ledger[1] != RUNNING)
#endif

#define serves (up && opening == 2 && session)
#define in_loop (serves && !polled)
#ifdef POLLS_BEFORE_DELIVERY
#define may_poll 1
#else
#define may_poll none_in_outbox
#endif

active proctype puller()
{
	byte c;
end_puller:
	do
	/* _open(): expire() looks which results wait; what ends meanwhile is in the outbox by itself */
	:: d_step { up && opening == 0 && !polled ->
		opening = 1; session = 1;
#ifndef OPEN_LOOKS_FOR_NOTHING
		FOR_ALL(c) waiting_in_ledger[c] = (ledger[c] == DONE); END_ALL(c)
#endif
	}
	:: d_step { up && opening == 1 ->
		opening = 2;
		FOR_ALL(c)
#ifdef OPEN_REPLACES_OUTBOX
			outbox[c] = waiting_in_ledger[c];
#else
			outbox[c] = outbox[c] || waiting_in_ledger[c];
#endif
			waiting_in_ledger[c] = 0;
		END_ALL(c) }
	/* the session broke: what was taken in is gone on with, then another one is opened */
	:: d_step { up && opening == 2 && !session && (!polled || all_listed_done) -> opening = 0; polled = 0 }

	/* poll(): the agent lists what lies there */
	:: d_step { (in_loop && something_listed && none_untold && may_poll) ->
		polled = 1;
		FOR_ALL(c)
			item_body[c] = (auth[c] != NONE || attacked -> pending[c] : NONE);
			item_token[c] = auth[c];
			item_cancel[c] = cancel_file[c];
#ifndef CANCELLED_ITEMS_ARE_TAKEN
			item_body[c] = (item_cancel[c] -> NONE : item_body[c]);
#endif
		END_ALL(c) }
	:: d_step { up && polled && all_listed_done -> polled = 0 }

	/* _cancel(): withdraw() and drop_queued(), or cancel(); then drop() */
#ifdef LEDGER_IS_NOT_TOLD_OF_CANCELS
#define withdraw(c) skip
#else
#define withdraw(c) ledger[c] = DELIVERED
#endif
#ifdef CANCELS_STAY
#define drop_request(c) pending[c] = NONE; auth[c] = NONE
#else
#define drop_request(c) forget_request(c)
#endif
	:: d_step { up && polled && item_cancel[0] -> c = 0 ;
		if
		:: queued[c] -> queued[c] = 0; withdraw(c)
		:: !queued[c] && (ledger[c] == CLAIMED || ledger[c] == RUNNING) -> stop[c] = 1
		:: !queued[c] && ledger[c] == DONE -> ledger[c] = DELIVERED; spool_result[c] = NONE
		:: else -> skip
		fi;
		if :: session -> drop_request(c); dropped[c] = 1 :: else -> skip fi;
		untold[c] = 0; item_cancel[c] = 0 }
#if NC == 2
	:: d_step { up && polled && item_cancel[1] -> c = 1 ;
		if
		:: queued[c] -> queued[c] = 0; withdraw(c)
		:: !queued[c] && (ledger[c] == CLAIMED || ledger[c] == RUNNING) -> stop[c] = 1
		:: !queued[c] && ledger[c] == DONE -> ledger[c] = DELIVERED; spool_result[c] = NONE
		:: else -> skip
		fi;
		if :: session -> drop_request(c); dropped[c] = 1 :: else -> skip fi;
		untold[c] = 0; item_cancel[c] = 0 }
#endif

#define verify_and_admit(c) \
	if \
	:: !token_matches(c, item_body[c], item_token[c]) -> refusal[c] = UNPROVEN_REFUSAL \
	:: else -> \
		if \
		:: ledger[c] == DELIVERED -> refusal[c] = REPLAY \
		:: ledger[c] == CLAIMED || ledger[c] == RUNNING || ledger[c] == DONE -> untold[c] = !outbox[c] \
		:: ledger[c] == NONE && !is_fresh(c) -> refusal[c] = REFUSED \
		:: ledger[c] == NONE && is_fresh(c) && !room -> refusal[c] = FOR_NOW \
		:: ledger[c] == NONE && is_fresh(c) && room -> \
			assert(fresh[c] || STALE_ALLOWED);      /* no stale request is taken in */ \
			admitted[c] = 1; spool_body[c] = item_body[c]; spool_token[c] = item_token[c] \
		fi \
	fi; \
	item_body[c] = NONE; item_token[c] = NONE

/* Refused for want of room: the same request may be taken later. */
#ifdef REFUSES_FOR_GOOD
#define FOR_NOW REFUSED
#else
#define FOR_NOW REPLAY
#endif
#ifdef SIGNS_ALL_REFUSALS
#define UNPROVEN_REFUSAL REFUSED
#else
#define UNPROVEN_REFUSAL FORGED
#endif

	/* admit() */
	:: d_step { up && polled && no_cancels && item_body[0] != NONE -> verify_and_admit(0) }
#if NC == 2
	:: d_step { up && polled && no_cancels && item_body[1] != NONE -> verify_and_admit(1) }
#endif
	/* claim(): claim_all() is one transaction, synced; with it all before it in the ledger's log is on disk */
	:: d_step { up && polled && no_cancels && all_verified && !none_admitted ->
		FOR_ALL(c)
			if
			:: admitted[c] ->
				admitted[c] = 0;
#ifdef NO_CLAIM
				queued[c] = 1; untold[c] = 1
#else
				if
				:: ledger[c] == NONE -> ledger[c] = CLAIMED; queued[c] = 1; untold[c] = 1
				:: else -> refusal[c] = REPLAY
				fi
#endif
			:: else -> skip
			fi;
		END_ALL(c)
#ifndef CLAIM_NOT_SYNCED
		FOR_ALL(c) synced[c] = ledger[c]; END_ALL(c)
#endif
	}
	/* _refuse() */
	:: d_step { up && polled && no_cancels && all_verified && none_admitted && refusal[0] != NONE -> c = 0;
		if :: session -> results[c] = refusal[c]; forget_request(c) :: else -> skip fi; refusal[c] = NONE }
#if NC == 2
	:: d_step { up && polled && no_cancels && all_verified && none_admitted && refusal[1] != NONE -> c = 1;
		if :: session -> results[c] = refusal[c]; forget_request(c) :: else -> skip fi; refusal[c] = NONE }
#endif

	/* take(): the marker in running/ stands for the request */
	:: d_step { (in_loop && untold[0]) -> untold[0] = 0; pending[0] = NONE }
#if NC == 2
	:: d_step { (in_loop && untold[1]) -> untold[1] = 0; pending[1] = NONE }
#endif

	/* deliver(): what the ledger says is done; the VM has it, dom0 hears of that, or the session breaks before it does */
#define deliver(c) \
	if \
	:: ledger[c] == DONE MAYBE_NOT_DONE(c) -> \
		results[c] = spool_result[c]; forget_request(c); \
		if \
		:: true -> to_close[c] = 1; outbox[c] = 0 \
		:: breaks > 0 -> breaks--; session = 0 \
		fi \
	MAYBE_LOST(c) \
	:: else -> outbox[c] = 0 \
	fi
	/* (where the request still lies there it is listed again, and refused: not what this mutation is about) */
#ifdef CLOSES_BEFORE_SENDING
#define MAYBE_LOST(c) :: breaks > 0 && ledger[c] == DONE && pending[c] == NONE -> breaks--; session = 0; to_close[c] = 1; outbox[c] = 0
#else
#define MAYBE_LOST(c)
#endif
#ifdef DELIVERS_BEFORE_FINISH
#define MAYBE_NOT_DONE(c) || worker[c] == 5
#define may_deliver(c) (outbox[c] || worker[c] == 5)
#else
#define MAYBE_NOT_DONE(c)
#define may_deliver(c) outbox[c]
#endif
	:: atomic { (serves && may_deliver(0) && (results[0] == NONE || results[0] == FORGED)) -> deliver(0) }
#if NC == 2
	:: atomic { (serves && may_deliver(1) && (results[1] == NONE || results[1] == FORGED)) -> deliver(1) }
#endif
	/* a result delivered again lies there already */
	:: d_step { (serves && outbox[0] && results[0] != NONE && results[0] != FORGED) -> to_close[0] = (ledger[0] == DONE); outbox[0] = 0 }
#if NC == 2
	:: d_step { (serves && outbox[1] && results[1] != NONE && results[1] != FORGED) -> to_close[1] = (ledger[1] == DONE); outbox[1] = 0 }
#endif
	od
}

/* close_deliveries(), beside the loop: delivered() in the ledger, then the spool */
active proctype closer()
{
end_closer:
	do
	:: d_step { up && to_close[0] -> to_close[0] = 0; if :: ledger[0] == DONE -> ledger[0] = DELIVERED :: else -> skip fi }
#if NC == 2
	:: d_step { up && to_close[1] -> to_close[1] = 0; if :: ledger[1] == DONE -> ledger[1] = DELIVERED :: else -> skip fi }
#endif
	od
}

/* ---- pullrpc.scheduler and Execution.execute(), a thread of the pool ---- */
proctype pool(byte c)
{
end_pool:
	do
	/* execute(): the row is CLAIMED, and what was kept is authenticated once more */
	:: d_step { up && queued[c] -> queued[c] = 0;
		if
#ifdef NO_CLAIM
		:: token_matches(c, spool_body[c], spool_token[c]) -> worker[c] = 1
#else
		:: ledger[c] == CLAIMED && token_matches(c, spool_body[c], spool_token[c]) -> worker[c] = 1
#endif
		:: else -> skip
		fi }
	/* start(): one caller succeeds */
	:: d_step { up && worker[c] == 1 ->
		if
#ifdef NO_CLAIM
		:: true -> worker[c] = 2
#endif
		:: ledger[c] == CLAIMED -> ledger[c] = RUNNING; worker[c] = 2
		:: else -> worker[c] = 0
		fi }
	/* the sandbox */
	:: d_step { up && worker[c] == 2 -> begins_to_run(c); worker[c] = 3 }
	:: d_step { up && worker[c] == 3 && stop[c] -> worker[c] = 4 }
	/* _finish_run(): the result is kept, then recorded */
	:: d_step { up && worker[c] == 3 -> spool_result[c] = OUTPUT; worker[c] = 5 }
	:: d_step { up && worker[c] == 5 ->
#ifdef NO_CLAIM
		ledger[c] = DONE;
#else
		if :: ledger[c] == CLAIMED || ledger[c] == RUNNING -> ledger[c] = DONE :: else -> skip fi;
#endif
		worker[c] = 6 }
	/* _finish_cancelled(): finish() and close_delivery() */
	:: d_step { up && worker[c] == 4 -> ledger[c] = DELIVERED; spool_result[c] = NONE; worker[c] = 6 }
	/* _post("finished") */
#ifdef NOBODY_HEARS_OF_THE_END
#define heard 0
#else
#define heard 1
#endif
	:: d_step { up && worker[c] == 6 -> worker[c] = 0; outbox[c] = heard; untold[c] = 0; stop[c] = 0 }
	od
}

/* ---- what breaks ---- */
active proctype world()
{
	byte c;
end_world:
	do
	/* Nothing more happens but what the code does. A break that must still come would repair what hangs. */
	:: d_step { !calm -> calm = 1; crashes = 0; breaks = 0; powercuts = 0; attacks = 0; fills = 0; ticks = 0; prunes = 0; clock_back = 0 }
	/* SIGKILL: all memory is gone, all that ran is ended */
	:: d_step { crashes > 0 && (up || recovering) -> crashes--; up = 0; recovering = 1; session = 0; opening = 0; polled = 0;
		FOR_ALL(c) forget_memory(c); END_ALL(c) }
	/* recover(), at the next engine's start: one command after the other */
	:: d_step { recovering && (ledger[0] == CLAIMED || ledger[0] == RUNNING) -> c = 0;
#ifdef RECOVER_RUNS_AGAIN
		ledger[c] = CLAIMED; queued[c] = 1; recovering = 0; up = 1
#else
		spool_result[c] = INTERRUPTED; ledger[c] = DONE
#endif
	}
#if NC == 2
	:: d_step { recovering && (ledger[1] == CLAIMED || ledger[1] == RUNNING) -> c = 1;
#ifdef RECOVER_RUNS_AGAIN
		ledger[c] = CLAIMED; queued[c] = 1; recovering = 0; up = 1
#else
		spool_result[c] = INTERRUPTED; ledger[c] = DONE
#endif
	}
#endif
#ifdef RECOVER_LEAVES_ROWS
	:: d_step { recovering -> recovering = 0; up = 1 }
#else
	:: d_step { recovering && all_recovered -> recovering = 0; up = 1 }
#endif
	/* a session breaks */
	:: d_step { breaks > 0 && session -> breaks--; session = 0 }
	/* dom0's power is cut: the VM is gone with it, and the ledger's last steps may be */
	:: atomic { powercuts > 0 && (up || recovering) ->
		powercuts--; power_was_cut = 1; up = 0; recovering = 1; session = 0; opening = 0; polled = 0;
		c = 0;
		do
		:: c < NC ->
			forget_memory(c);
			do
			:: ledger[c] > synced[c] -> ledger[c]--
			:: break
			od;
			if
			:: true -> spool_result[c] = NONE
			:: true -> skip
			fi;
			client[c] = (client[c] != IDLE && client[c] < ANSWERED -> DIED : client[c]);
			c++
		:: else -> break
		od;
		c = 0
	}
	/* dom0's disk is full for a while */
	:: d_step { fills > 0 && room -> fills--; room = 0 }
	:: d_step { !room -> room = 1 }
	/* max_age passes */
	:: d_step { ticks > 0 && fresh[0] -> ticks--; fresh[0] = 0 }
	/* prune(): delivered, and claimed ledger_keep_days ago, which is longer than max_age, and than any client waits */
	:: d_step { prunes > 0 && ledger[0] == DELIVERED && !fresh[0] && !to_close[0] && client[0] >= ANSWERED -> prunes--; ledger[0] = NONE; synced[0] = NONE }
	/* somebody sets dom0's clock back, by more than ledger_keep_days */
	:: d_step { clock_back > 0 && !fresh[0] -> clock_back--; fresh[0] = 1 }
	od
}

#if ATTACKS > 0
/* Who owns the VM's disk, and what answers dom0 there, but not the key. They know each token once its client has written it. */
bit knows[NC];
byte kept_result[NC];

active proctype attacker()
{
	byte c, z, body;
	do
	:: atomic { attacks > 0 ->
		attacks--; attacked = 1;
		c = 0; z = 0; body = EVIL;
		if :: NC > 1 -> c = NC - 1 :: true -> skip fi;
		if :: NC > 1 -> z = NC - 1 :: true -> skip fi;
		if
		/* puts any body under any id with any token there is: replay, swapped body, swapped token */
		:: client[z] >= TOKEN_WRITTEN ->
			if :: body = OF(c) :: body = OF(z) :: body = EVIL fi;
			pending[c] = body; auth[c] = OF(z)
		:: pending[c] = EVIL; auth[c] = EVIL
		/* lies to the client, deletes, cancels */
		:: results[c] == NONE -> results[c] = FORGED
		:: results[c] != NONE -> results[c] = NONE; withheld[c] = 1
		:: pending[c] != NONE -> pending[c] = NONE; withheld[c] = 1
		:: cancel_file[c] = 1; withheld[c] = 1
		/* answers a poll out of their own head: what was taken, again (twice in one answer ends the session) */
		:: polled && listing_done(c) && client[z] >= TOKEN_WRITTEN -> item_body[c] = OF(z); item_token[c] = OF(z)
		fi;
		c = 0; z = 0; body = 0
	}
	:: attacks == 0 -> break
	od
}
#endif

/* Nothing can go on: then every client must have its end, and every command its row at rest. That nothing goes round in circles
 * for ever is for spin to find (see check.py). */
active proctype judge()
{
	byte c;
	timeout ->
	FOR_ALL(c)
		assert(client[c] >= ANSWERED || withheld[c]);
		assert(up);
#ifndef ROWS_ARE_NOT_JUDGED
		assert(ledger[c] == NONE || ledger[c] == DELIVERED)
#endif
		;
	END_ALL(c)
}

init
{
	byte c;
	atomic {
		up = 1;
		FOR_ALL(c)
			fresh[c] = 1;
			run client_of(c);
			run pool(c);
		END_ALL(c)
	}
}
